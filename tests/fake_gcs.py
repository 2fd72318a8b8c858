"""An object store in this process: what etils' epath asks of fsspec, and what TensorStore asks of HTTP, over one dict.

As in the real thing there are no folders, nothing can be appended to, and an object appears when all of it is there.
"""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import re
import sys
import threading
import time
import urllib.parse

import fsspec
from etils.epath import backend
from orbax.checkpoint._src.path import gcs_utils


class Store(dict):
    """{"bucket/name": bytes}; generations count the writes, as Cloud Storage does."""

    def __init__(self):
        super().__init__()
        self.generation, self.lock, self.puts = {}, threading.RLock(), {}

    def put(self, name: str, content: bytes) -> None:
        with self.lock:
            self[name] = bytes(content)
            self.generation[name] = self.generation.get(name, 0) + 1
            self.puts[name] = self.puts.get(name, 0) + 1

    def below(self, prefix: str) -> list[str]:
        with self.lock:
            return sorted(n for n in self if n.startswith(prefix))


class _Upload(io.BytesIO):
    def __init__(self, store: Store, name: str):
        super().__init__()
        self._done = lambda content: store.put(name, content)

    def close(self) -> None:
        if not self.closed:
            self._done(self.getvalue())
        super().close()


class FileSystem(fsspec.AbstractFileSystem):
    protocol = ("gcs", "gs")
    cachable = False
    store: Store

    @classmethod
    def _strip_protocol(cls, path):
        return re.sub(r"^(gs|gcs)://", "", str(path)).rstrip("/")

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        found = {}
        for name in self.store.below(f"{path}/"):
            child, deeper, _ = name[len(path) + 1 :].partition("/")
            kind = "directory" if deeper else "file"
            found[f"{path}/{child}"] = {"name": f"{path}/{child}", "type": kind, "size": len(self.store[name])}
        if not found:
            if path not in self.store:
                raise FileNotFoundError(path)
            found[path] = self.info(path)
        return list(found.values()) if detail else list(found)

    def info(self, path, **_):
        path = self._strip_protocol(path)
        if path in self.store:
            return {"name": path, "type": "file", "size": len(self.store[path]), "mtime": time.time()}
        if self.store.below(f"{path}/"):
            return {"name": path, "type": "directory", "size": 0, "mtime": 0}
        raise FileNotFoundError(path)

    def _open(self, path, mode="rb", **_):
        path = self._strip_protocol(path)
        if mode == "wb":
            return _Upload(self.store, path)
        if mode != "rb":
            raise ValueError(f"an object store cannot open with mode {mode!r}")
        if path not in self.store:
            raise FileNotFoundError(path)
        return io.BytesIO(self.store[path])

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def cp_file(self, path1, path2, **_):
        name = self._strip_protocol(path1)
        if name not in self.store:  # as for what is only the beginning of names
            raise FileNotFoundError(path1)
        self.store.put(self._strip_protocol(path2), self.store[name])

    def _rm(self, path):
        self.store.pop(self._strip_protocol(path), None)  # fsspec has looked whether anything is there


def _handler(store: Store) -> type:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, code, content=b"", kind="application/json", **headers):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for name, value in {"Content-Type": kind, "Content-Length": len(content), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(content)

        def asked(self):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            match = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
            return match[1], urllib.parse.unquote(match[2] or query.get("name", "")), query

        def about(self, key):
            bucket, _, name = key.partition("/")
            md5 = base64.b64encode(hashlib.md5(store[key]).digest()).decode()
            size, generation = str(len(store[key])), str(store.generation[key])
            now = "2026-01-01T00:00:00.000Z"
            own = {"name": name, "bucket": bucket, "size": size, "generation": generation, "md5Hash": md5}
            return own | {"metageneration": "1", "updated": now, "timeCreated": now, "etag": generation}

        def refused(self, key, query):
            wanted = query.get("ifGenerationMatch")
            return wanted is not None and int(wanted) != (store.generation.get(key, 0) if key in store else 0)

        def do_GET(self):
            bucket, name, query = self.asked()
            if not name:
                prefix = query.get("prefix", "")
                keys = [k for k in store.below(f"{bucket}/{prefix}")]
                return self.answer(200, {"kind": "storage#objects", "items": [self.about(k) for k in keys]})
            key = f"{bucket}/{name}"
            with store.lock:
                if key not in store:
                    return self.answer(404, {"error": {"code": 404}})
                if query.get("ifGenerationNotMatch") == str(store.generation[key]):
                    return self.answer(304)
                if self.refused(key, query):
                    return self.answer(412)
                content, generation = store[key], store.generation[key]
                if query.get("alt") != "media":
                    return self.answer(200, self.about(key))
            size = len(content)
            headers = {"x_goog_generation": generation}
            if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
                first, last = match.groups()
                begin = int(first) if first else max(size - int(last), 0)
                end = min(int(last) + 1, size) if first and last else size
                if begin >= size:
                    return self.answer(416)
                headers["Content_Range"] = f"bytes {begin}-{end - 1}/{size}"
                return self.answer(206, content[begin:end], "application/octet-stream", **headers)
            self.answer(200, content, "application/octet-stream", **headers)

        def do_POST(self):
            bucket, name, query = self.asked()
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = f"{bucket}/{name}"
            with store.lock:
                if self.refused(key, query):
                    return self.answer(412)
                store.put(key, content)
                self.answer(200, self.about(key))

        def do_DELETE(self):
            bucket, name, query = self.asked()
            key = f"{bucket}/{name}"
            with store.lock:
                if key not in store:
                    return self.answer(404)
                if self.refused(key, query):
                    return self.answer(412)
                del store[key]
            self.answer(204)

    return Handler


@contextlib.contextmanager
def serve(monkeypatch):
    """Everything under gs:// is in the store that this gives."""
    store = Store()
    monkeypatch.setattr(FileSystem, "store", store, raising=False)
    for name in FileSystem.protocol:
        fsspec.register_implementation(name, FileSystem, clobber=True)
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(store))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    # Asks Google's own client what kind of bucket it is.
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        for name in FileSystem.protocol:
            sys.modules["fsspec.registry"]._registry.pop(name, None)
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()
