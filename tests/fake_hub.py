"""A small Hub on loopback, as far as creating a repository and uploading to it go. Keeps what it was sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_goodtokenforthefakehub"


class FakeHub(ThreadingHTTPServer):
    """`repos` maps (kind, id) to {path: bytes}; `refuse` maps a path's start to the (status, message) it answers with."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {("models", "microsoft/phi-2"): {}}
        self.refuse: dict[str, tuple[int, str]] = {}
        self.created: list[dict] = []
        self.requests: list[str] = []
        self.role = "write"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, data: dict | list, status: int = 200, **headers):
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, message: str):
        self.answer({"error": message}, status, **{"X-Error-Message": message})

    def handle_any(self):
        hub, path = self.server, unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub.requests.append(f"{self.command} {path}")
        for start, refusal in hub.refuse.items():
            if path.startswith(start):
                return self.refuse(*refusal)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Invalid user token.")
        if path == "/api/whoami-v2":
            auth = {"accessToken": {"role": hub.role}}
            return self.answer({"name": "me", "type": "user", "orgs": [{"name": "lab"}], "auth": auth})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name, kind = f"{asked.get('organization') or 'me'}/{asked['name']}", f"{asked.get('type', 'model')}s"
            if (kind, name) in hub.repos:
                return self.answer({"error": "You already created this repo", "url": f"{hub.url}/{name}"}, 409)
            hub.created.append(asked)
            hub.repos[(kind, name)] = {}
            return self.answer({"url": f"{hub.url}/{'' if kind == 'models' else kind + '/'}{name}", "name": name, "id": name})
        kind, owner, name, *rest = path.removeprefix("/api/").split("/")
        repo = hub.repos.get((kind, f"{owner}/{name}"))
        if repo is None:
            return self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        if not rest or rest[0] == "revision":
            private = any(made["name"] == name and made.get("visibility") == "private" for made in hub.created)
            siblings = [{"rfilename": path} for path in repo]
            about = {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": siblings, "private": private, "tags": []}
            return self.answer(about)
        if rest[0] == "tree":
            return self.answer([{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in repo.items()])
        if rest[0] == "preupload":  # all in the commit itself; the real Hub wants large files in its storage first
            asked = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer({"files": [{**file, "shouldIgnore": False, "oid": None} for file in asked]})
        for part in map(json.loads, body.decode().splitlines()):
            if part["key"] == "file":
                repo[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
            elif part["key"] == "deletedFile":
                del repo[part["value"]["path"]]
        url = f"{hub.url}/{owner}/{name}/commit/{'1' * 40}"
        return self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})

    do_GET = do_POST = do_HEAD = handle_any
