"""A stand-in for the Hugging Face hub on this machine: as much of it as one upload and one download ask for."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value, status=200, **headers):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        hub = self.server
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub.asked.append(("POST", self.path, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.answer({"error": "no"}, 401)
        elif self.path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}" if about.get("organization") else about["name"]
            hub.private.setdefault(name, bool(about.get("private")) or about.get("visibility") == "private")
            self.answer({"url": f"{hub.address}/{name}", "name": name})
        elif self.path.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "header":
                    hub.messages.append(line["value"]["summary"])
            url = f"{hub.address}/me/flowers/commit/{COMMIT}"
            self.answer({"commitUrl": url, "commitOid": COMMIT, "hookOutput": "", "pullRequestUrl": None})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self):
        hub = self.server
        hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
        name = self.path.partition("?")[0].rpartition("/resolve/")[2].partition("/")[2]
        if "/resolve/" in self.path and name in hub.files:
            content = hub.files[name]
            tag = hashlib.sha256(content).hexdigest()
            self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
        elif "/resolve/" in self.path:
            self.answer({"error": "no entry"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        elif self.path.startswith("/api/models/"):
            about = {"id": "me/flowers", "sha": COMMIT, "private": hub.private.get("me/flowers", False)}
            self.answer(about | {"siblings": [{"rfilename": f} for f in hub.files]})
        else:
            self.answer({"error": self.path}, 404)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server asks for


@contextmanager
def hub():
    """The server: `address`, `files` by name, `asked`, `messages` of commits."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.messages, server.private = {}, [], [], {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
