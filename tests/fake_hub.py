"""A Hub on this machine, for the real clients `datasets` and `huggingface_hub`: it answers what
they ask about data sets whose files are in a dict."""

import contextlib
import hashlib
import http.server
import json
import os
import threading
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "a" * 40


@contextlib.contextmanager
def fake_hub(repositories, home):
    """repositories: {name: {path: bytes}}. home: a folder for the clients' caches.
    Yields (the environment of a process that shall use this Hub, the list of what was asked)."""
    handler = type("Handler", (Hub,), {"repositories": repositories, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        yield environment, handler.asked
        server.shutdown()


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        url = urlparse(self.path)
        self.asked.append(f"{self.command} {self.path}")
        parts = unquote(url.path).strip("/").split("/")
        if parts == [""]:
            self.send(b"")
        elif parts[:2] == ["api", "datasets"]:
            self.answer_api("/".join(parts[2:4]), parts[4:], parse_qs(url.query))
        elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            self.send_file("/".join(parts[1:3]), "/".join(parts[5:]))
        else:
            self.send_error_code("EntryNotFound")

    do_GET = do_HEAD = answer

    def answer_api(self, name, rest, query):
        files = self.repositories.get(name)
        if files is None:
            self.send_error_code("RepoNotFound")
        elif rest[:1] == ["tree"]:
            self.send(self.tree(files, "/".join(rest[2:])))
        else:
            siblings = [{"rfilename": file} for file in files]
            revision = rest[1] if rest[:1] == ["revision"] else "main"
            other = hashlib.sha1(revision.encode()).hexdigest()
            sha = COMMIT if revision in ("main", COMMIT) else other
            self.send({"id": name, "sha": sha, "siblings": siblings})

    def tree(self, files, folder):
        """The files right in the folder, and the folders."""
        start = f"{folder}/" if folder else ""
        entries, folders = [], set()
        for path, content in files.items():
            if not path.startswith(start):
                continue
            below = path.removeprefix(start)
            if "/" in below:
                folders.add(start + below.split("/")[0])
            else:
                oid = hashlib.sha1(content).hexdigest()
                entries.append({"type": "file", "path": path, "size": len(content), "oid": oid})
        for path in folders:
            entries.append({"type": "directory", "path": path, "size": 0, "oid": "d" * 40})
        return entries

    def send_file(self, name, path):
        content = self.repositories.get(name, {}).get(path)
        if content is None:
            self.send_error_code("EntryNotFound")
            return
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        asked = self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            first, last = int(first), min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        self.send(content, 206 if asked else 200, headers)

    def send_error_code(self, code):
        self.send({"error": code}, 404, {"X-Error-Code": code})

    def send(self, content, status=200, headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass
