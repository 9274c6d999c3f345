"""`push`, to a server of this machine that stands for the hub."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import pytest

import secateur
from secateur.checkpoint.push import push, to_upload


class Hub(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks for on the way to a commit. Files of more than a few bytes go by LFS."""

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        self.answer({"error": "You may not."}, self.server.status)

    def do_PUT(self):
        content = self.body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self):
        path, content = urlparse(self.path).path, self.body()
        self.server.asked.append((path, self.headers.get("Authorization")))
        if self.server.status != 200:
            self.answer({"error": "You may not."}, self.server.status)
        elif path == "/api/repos/create":
            self.server.made = json.loads(content)
            self.answer({"url": f"{self.server.address}/someone/model", "id": "someone/model"})
        elif "/branch/" in path:
            self.answer({})
        elif "/preupload/" in path:
            files = json.loads(content)["files"]
            self.answer(
                {
                    "files": [
                        {**f, "uploadMode": "lfs" if f["size"] > 2000 else "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            action = {"upload": {"href": f"{self.server.address}/large"}}
            self.answer({"transfer": "basic", "objects": [{**each, "actions": action} for each in objects]})
        elif "/commit/" in path:
            self.server.commit = [json.loads(line) for line in content.splitlines()]
            self.server.branch = path.rpartition("/")[2]
            self.answer(
                {
                    "commitUrl": f"{self.server.address}/someone/model/commit/{40 * '0'}",
                    "commitOid": "0" * 40,
                    "pullRequestUrl": None,
                    "success": True,
                }
            )
        else:
            self.answer({})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.large, server.status, server.commit = [], {}, 200, None
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_every_file_arrives(hub, packed_of):
    folder = packed_of("llama", "packed-int")
    address = push(folder, "someone/model", endpoint=hub.address, token="hf_secret", private=True, branch="small")
    assert address == f"{hub.address}/someone/model"
    assert hub.made["name"] == "model"
    assert hub.made["organization"] == "someone"
    assert hub.branch == "small"
    assert {token for _, token in hub.asked} == {"Bearer hf_secret"}
    arrived = {}
    for line in hub.commit:
        if line["key"] == "lfsFile":
            arrived[line["value"]["path"]] = line["value"]["oid"]
        elif line["key"] == "file":
            arrived[line["value"]["path"]] = hashlib.sha256(base64.b64decode(line["value"]["content"])).hexdigest()
    wanted = json.loads((folder / "secateur.json").read_text())["files"]
    assert arrived.pop("secateur.json") == hashlib.sha256((folder / "secateur.json").read_bytes()).hexdigest()
    assert arrived == wanted
    assert wanted["model.safetensors"] in hub.large
    assert hub.commit[0]["value"]["summary"].startswith("Upload by secateur")


@pytest.mark.parametrize("status", [401, 403])
def test_who_may_not_is_told(status, hub, packed_of):
    hub.status = status
    with pytest.raises(
        secateur.UsageError, match=f"cannot be written with this token .*{status}.*hf auth login"
    ) as caught:
        push(packed_of("llama", "bitmap"), "someone/model", endpoint=hub.address, token="hf_secret")
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_a_hub_that_is_not_there(hub, packed_of):
    with pytest.raises(secateur.SecateurError, match="someone/model was not uploaded") as caught:
        push(packed_of("llama", "bitmap"), "someone/model", endpoint="http://127.0.0.1:9", token="hf_secret")
    assert "\n" not in str(caught.value)


def test_a_dry_run_asks_nobody(hub, packed_of, says, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", never)
    folder = packed_of("llama", "bitmap")
    code, _, stderr = says("push", folder, "someone/model", "--dry-run")
    assert code == 0
    files = to_upload(folder, "someone/model")
    assert all(f"  {name}\n" in stderr for name in files)
    assert stderr.endswith("would be uploaded to someone/model\n")
    assert f"{len(files)} files" in stderr


def test_what_is_not_to_be_uploaded(packed_of, own_model, tmp_path, says):
    folder = packed_of("llama", "bitmap")
    for name in ("model", "a/b/c", "some one/model", "/x", ""):
        with pytest.raises(secateur.UsageError, match="is no name on the hub"):
            to_upload(folder, name)
    with pytest.raises(secateur.UsageError, match="is not a folder"):
        to_upload(tmp_path / "nothing", "a/b")
    with pytest.raises(secateur.CheckpointError, match=r"secateur\.json: is missing"):
        to_upload(own_model("llama"), "a/b")
    secateur.compress(str(own_model("qwen2")), tmp_path / "out", {"quantize": "rtn"})
    (tmp_path / "out" / "more.json").write_text("{}")
    code, _, stderr = says("push", tmp_path / "out", "a/b", "--dry-run")
    assert code == 1
    assert "more.json: is not named in secateur.json" in stderr
    (tmp_path / "out" / "more.json").unlink()
    assert "secateur.json" in to_upload(tmp_path / "out", "a/b")
