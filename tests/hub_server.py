"""A Hub on loopback, kept in memory: repositories, commits, branches, pull requests, large files, users and rights.

It answers the requests of huggingface_hub as the real one does, as far as pushing and loading models goes.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".png", ".model")


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status, message, code=None, **body):
        self.status, self.code, self.body = status, code, {"error": message, **body}


class Repository:
    """Commits of one model: a commit is {path: content}, a branch the name of a commit."""

    def __init__(self, name, private):
        self.name, self.private = name, private
        self.commits, self.messages, self.refs = {}, {}, {}
        self.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def add(self, ref, files, message):
        sha = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.messages[sha] = files, message
        self.refs[ref] = sha
        return sha

    def sha(self, revision):
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision="main"):
        return self.commits[self.sha(revision)]


class Hub(ThreadingHTTPServer):
    """Listens on a free port from the start; `endpoint` is for HF_ENDPOINT, `close` ends it.

    Attributes:
        users: By token: (name, whether the token may write).
        repositories: By "owner/name".
        large_files: Content of large files by their SHA-256.
        cuts: By SHA-256, how many of the next uploads of that large file lose their connection in the middle.
        requests: How often each method was called on each kind of address.
    """

    daemon_threads = True

    def __init__(self, users):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users, self.repositories, self.large_files = users, {}, {}
        self.cuts, self.requests, self.lock = Counter(), Counter(), threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A connection that was cut is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do(self):
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        query = parse_qs(address.query, keep_blank_values=True)
        try:
            if parts[0] == "lfs":
                self.receive(parts[1])
                return
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            with self.server.lock:
                self.route(parts, query, body)
        except Refused as refused:
            extra = {"X_Error_Code": refused.code} if refused.code else {}
            self.answer(refused.status, refused.body, X_Error_Message=refused.body["error"], **extra)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def route(self, parts, query, body):
        user, may_write = self.user()
        match parts:
            case ["api", "validate-yaml"]:
                self.count("validate")
                content = json.loads(body)["content"]
                errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
                self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
            case ["api", "repos", "create"]:
                self.create(json.loads(body), user, may_write)
            case ["api", "models", owner, name, *rest]:
                repository = self.repository(f"{owner}/{name}", user)
                is_owner = owner == user and may_write
                self.api(repository, rest or ["revision", "main"], query, body, user, is_owner)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self.batch(self.repository(f"{owner}/{name.removesuffix('.git')}", user), json.loads(body))
            case [owner, name, "resolve", revision, *path]:
                self.count("resolve")
                self.resolve(self.repository(f"{owner}/{name}", user), revision, "/".join(path))
            case _:
                raise Refused(404, f"no such address: {self.path}")

    def count(self, what):
        self.server.requests[f"{self.command} {what}"] += 1

    def user(self):
        """(name, may write) of whoever asks; (None, False) without a token."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.server.users.get(token, (None, False))

    def repository(self, name, user):
        found = self.server.repositories.get(name)
        if found is None or (found.private and name.split("/")[0] != user):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def create(self, asked, user, may_write):
        self.count("create")
        name = f"{asked['organization'] or user}/{asked['name']}"
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if name.split("/")[0] != user or not may_write:
            raise Refused(403, f"You don't have the rights to create a model under this namespace: {name}")
        url = f"{self.server.endpoint}/{name}"
        if name in self.server.repositories:
            raise Refused(409, "You already created this model repo", url=url)
        self.server.repositories[name] = Repository(name, asked.get("visibility") == "private")
        self.answer(200, {"url": url, "name": name})

    def api(self, repository, rest, query, body, user, is_owner):
        self.count(rest[0])
        match rest:
            case ["revision", revision]:
                files = [{"rfilename": path} for path in repository.files(revision)]
                sha = repository.sha(revision)
                told = {"_id": sha[:24], "id": repository.name, "sha": sha, "private": repository.private}
                self.answer(200, {**told, "siblings": files})
            case ["tree", revision, *path]:
                folder = "/".join(path)
                inside = [p for p in repository.files(revision) if not folder or p.startswith(f"{folder}/")]
                if folder and not inside:
                    raise Refused(404, f"{folder} does not exist", "EntryNotFound")
                self.answer(200, [self.entry(repository, revision, path) for path in inside])
            case ["refs"]:
                named = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repository.refs.items()]
                self.answer(200, {"branches": named, "converts": [], "tags": []})
            case ["branch", branch]:
                self.must_own(is_owner)
                if branch in repository.refs:
                    raise Refused(409, "Reference already exists")
                repository.refs[branch] = repository.sha("main")
                self.answer(200, {})
            case ["preupload", revision]:
                files = repository.files(revision)
                asked = json.loads(body)["files"]
                self.answer(200, {"files": [self.upload_mode(file["path"], files) for file in asked]})
            case ["commit", revision]:
                is_pr = "create_pr" in query
                self.must_own(is_owner or (is_pr and user is not None))
                self.commit(repository, revision, is_pr, [json.loads(line) for line in body.splitlines()])
            case _:
                raise Refused(404, f"no such address: {self.path}")

    def must_own(self, allowed):
        if not allowed:
            raise Refused(403, "Forbidden: you don't have write access to this repository")

    def upload_mode(self, path, files):
        is_large = path.endswith(LARGE)
        found = {"oid": self.oid(path, files[path])} if path in files else {}
        return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, **found}

    def oid(self, path, content):
        if path.endswith(LARGE):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, repository, revision, path):
        content = repository.files(revision)[path]
        large = {"lfs": {"oid": self.oid(path, content), "size": len(content), "pointerSize": 134}}
        told = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        return told | (large if path.endswith(LARGE) else {})

    def batch(self, _, asked):
        self.count("batch")
        answers = []
        for one in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{one['oid']}", "header": {}}}}
            answers.append(one | (upload if one["oid"] not in self.server.large_files else {}))
        self.answer(200, {"transfer": "basic", "objects": answers})

    def receive(self, oid):
        """Content of a large file; a cut connection closes after half of it."""
        length = int(self.headers["Content-Length"])
        with self.server.lock:
            self.count("lfs")
            is_cut = self.server.cuts[oid] > 0
            self.server.cuts[oid] -= is_cut
        content = self.rfile.read(length // 2 if is_cut else length)
        if is_cut:
            self.close_connection = True
            self.connection.close()
            return
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "content does not match its oid")
        self.server.large_files[oid] = content
        self.answer(200)

    def commit(self, repository, revision, is_pr, lines):
        files, message = dict(repository.files(revision)), ""
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.server.large_files:
                        raise Refused(400, f"{value['path']} was not uploaded")
                    files[value["path"]] = self.server.large_files[value["oid"]]
                case "deletedFile":
                    files.pop(value["path"])
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        sha = repository.add(f"refs/pr/{number}" if is_pr else revision, files, message)
        url = f"{self.server.endpoint}/{repository.name}"
        told = {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha}
        self.answer(200, told | ({"pullRequestUrl": f"{url}/discussions/{number}"} if is_pr else {}))

    def resolve(self, repository, revision, path):
        files = repository.files(revision)
        headers = {"X_Repo_Commit": repository.sha(revision)}
        if path not in files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        content = files[path]
        self.answer(200, content, ETag=f'"{self.oid(path, content)}"', X_Linked_Size=len(content), **headers)
