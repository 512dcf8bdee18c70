"""Models of the Hugging Face hub by name: two files are fetched, weights and their description; no other, and nothing is run."""

import contextlib
import re
from pathlib import Path

from dynamixer.errors import RunError, UserError, first_line
from dynamixer.models.about import CONFIG

HUB = "hf-hub:"
WEIGHTS = "model.safetensors"


def fetch(name: str) -> Path:
    """The local folder with the files of "hf-hub:OWNER/NAME" or "hf-hub:OWNER/NAME@REVISION", fetched if need be.

    Raises:
        UserError: no such model, or one without safetensors.
        RunError: it could not be downloaded.
    """
    found = re.fullmatch(r"hf-hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if found is None:
        raise UserError(
            f"{name} is not a model of the hub: it has to be hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION."
        )
    import huggingface_hub  # noqa: PLC0415 - half a second
    from huggingface_hub import errors  # noqa: PLC0415

    repository, revision = found[1], found[2]
    try:
        weights = Path(huggingface_hub.hf_hub_download(repository, WEIGHTS, revision=revision))
        with contextlib.suppress(errors.RemoteEntryNotFoundError):  # our own files say in their header what they are
            huggingface_hub.hf_hub_download(repository, CONFIG, revision=revision)
        return weights.parent
    except errors.RemoteEntryNotFoundError:
        raise UserError(f"{name} has no {WEIGHTS}, and other formats (pickles) are not read.") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UserError(f"there is no {name}, or it is private: `hf auth login` lets you in.") from None
    except errors.HFValidationError as error:
        raise UserError(f"{name} is not a model of the hub: {str(error).splitlines()[0]}") from None
    except Exception as error:  # whatever the network does
        raise RunError(f"{name} could not be downloaded: {first_line(error).rstrip('.')}.") from None


def called(path: Path) -> str:
    """What a model is called whose file lies there: by its repository in the hub's cache, by its folder, or by the file."""
    path = path.absolute()
    if path.parent.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION/model.safetensors
        return path.parents[2].name.rpartition("--")[2]
    return path.parent.name if path.stem in ("best", "last", "model") else path.stem
