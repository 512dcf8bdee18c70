"""A server for a trained model: a page that shows how it mixes, and a JSON API (docs/serve.md). Needs `dynamixer[serve]`."""

from dynamixer.serve.server import serve
from dynamixer.serve.settings import Settings

__all__ = ["Settings", "serve"]
