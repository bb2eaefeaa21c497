"""The data in storage: pushed once, pulled into clones that have none, and refused when it is damaged or not allowed.

S3 is moto's server on loopback with its checks of signatures and policies on; SSH is asyncssh's server.
"""

import asyncio
import configparser
import json
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import asyncssh
import boto3
import pytest
import yaml
from disk import contents
from moto.server import ThreadedMotoServer
from PIL import Image
from tiny_run import ROOT, shell, tiny_run

__all__ = ["tiny_run"]  # a fixture
BUCKET = "team"
Keys = dict[str, str]


@dataclass(frozen=True)
class Storage:
    endpoint: str
    writer: Keys
    reader: Keys

    def objects(self) -> Any:
        session = boto3.Session(self.writer["AWS_ACCESS_KEY_ID"], self.writer["AWS_SECRET_ACCESS_KEY"])
        return session.resource("s3", endpoint_url=self.endpoint, region_name="us-east-1").Bucket(BUCKET)

    def object(self, md5: str) -> Any:
        return self.objects().Object(f"dspo/files/md5/{md5[:2]}/{md5[2:]}")


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    """An S3 server with one bucket and two users, who must sign what they ask for."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    session = boto3.Session("setup", "setup", region_name="us-east-1")
    session.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
    iam = session.client("iam", endpoint_url=endpoint)

    def user(name: str, actions: list[str]) -> Keys:
        statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
        iam.create_user(UserName=name)
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName=name, PolicyName="storage", PolicyDocument=policy)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    users = [user("writer", ["s3:*"]), user("reader", ["s3:GetObject", "s3:ListBucket"])]
    text = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset-auth", b"0", text, method="POST"))
    yield Storage(endpoint, *users)
    server.stop()


@pytest.fixture(scope="module")
def published(tiny_run: Path, storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run whose remote a team has set, in the one place for it; all of it is pushed."""
    root = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("published") / "root"))
    shell(root, "dvc", "remote", "modify", "storage", "url", f"s3://{BUCKET}/dspo")
    shell(root, "dvc", "remote", "modify", "storage", "endpointurl", storage.endpoint)
    shell(root, "git", "commit", "--quiet", "--all", "--message", "our storage")
    assert shell(root, "git", "show", "--name-only", "--format=").stdout.split() == [".dvc/config"]
    shell(root, "dvc", "push", "--run-cache", env=storage.writer)
    return root


@pytest.fixture
def clone(published: Path, tmp_path: Path) -> Path:
    shell(tmp_path, "git", "clone", "--quiet", published, "clone")
    return tmp_path / "clone"


def change(root: Path, section: str, key: str, value: float) -> None:
    raw = yaml.safe_load((root / "params.yaml").read_text())
    raw["worlds"]["shapes"][section][key] = value
    (root / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))


def test_git_holds_where_the_data_is_and_no_credentials() -> None:
    config = configparser.ConfigParser()
    config.read_string((ROOT / ".dvc/config").read_text().replace("    ", ""))
    (name,) = [name for name in config.sections() if "remote" in name]
    assert config["core"]["remote"] in name
    assert config[name].keys() <= {"url", "endpointurl", "region", "verify"}
    assert config[name].getboolean("verify")
    assert "@" not in config[name]["url"]
    assert shell(ROOT, "git", "check-ignore", ".dvc/config.local").stdout.strip() == ".dvc/config.local"


def test_the_adapter_alone_makes_an_image(clone: Path, published: Path, storage: Storage) -> None:
    shell(clone, "dvc", "pull", "models/adapter", env=storage.reader)
    assert contents(clone / "models/adapter") == contents(published / "models/adapter")
    assert not (clone / "data/pairs").exists()
    (clone / "wish.csv").write_text("prompt\na red circle\n")
    make = ("python", "-m", "dspo.cli", "batch-generate", "--model", "models/adapter", "--prompts", "wish.csv")
    shell(clone, *make, "--output", "images", env={"PYTHONPATH": "src"})
    (image,) = (clone / "images").rglob("*.png")
    assert Image.open(image).size == (64, 64)


def test_after_a_pull_nothing_is_left_to_run(clone: Path, storage: Storage) -> None:
    shell(clone, "dvc", "pull", env=storage.reader)
    said = shell(clone, "dvc", "repro").stdout
    assert "up to date" in said
    assert "Running stage" not in said
    assert shell(clone, "git", "status", "--porcelain").stdout == ""


def test_evaluate_alone_fetches_what_it_reads(clone: Path, storage: Storage) -> None:
    change(clone, "evaluate", "bootstrap_resamples", 21)
    said = shell(clone, "dvc", "repro", "--pull", "--allow-missing", "evaluate", env=storage.reader).stdout
    assert [line for line in said.splitlines() if line.startswith("Running")] == ["Running stage 'evaluate':"]
    assert (clone / "data/evaluation/results.json").exists()
    assert not [name for name in ("ratings", "candidates", "pairs") if (clone / "data" / name).exists()]


def test_outputs_are_fetched_from_outside_the_repository(published: Path, storage: Storage, tmp_path: Path) -> None:
    shell(published, "git", "tag", "--annotate", "adapter@v1.0.0", "--message", "a version of the artifact")
    # By its address: of a repository that is given as a folder DVC reads the cache and asks no storage.
    shell(tmp_path, "git", "clone", "--bare", published, "server.git")
    server = f"file://{tmp_path}/server.git"
    shell(tmp_path, "dvc", "get", server, "models/adapter", "--out", "by-path", env=storage.reader)
    shell(tmp_path, "dvc", "artifacts", "get", server, "adapter", "--out", "by-version", env=storage.reader)
    for name in ("by-path", "by-version"):
        assert contents(tmp_path / name) == contents(published / "models/adapter")


def test_what_a_colleague_has_run_is_not_run_again(clone: Path, published: Path, storage: Storage) -> None:
    (clone / "dvc.lock").unlink()  # nobody ran this branch
    said = shell(clone, "dvc", "repro", "--pull", "evaluate", env=storage.reader).stdout
    assert "Running stage" not in said
    assert said.count("is cached - skipping run") == 7
    assert contents(clone / "models/adapter") == contents(published / "models/adapter")


def test_reading_takes_a_key_and_writing_one_that_may(clone: Path, storage: Storage) -> None:
    assert "Unable to locate credentials" in shell(clone, "dvc", "pull", fails=True).stdout
    stranger = storage.reader | {"AWS_SECRET_ACCESS_KEY": "guessed"}
    assert "403" in shell(clone, "dvc", "pull", fails=True, env=stranger).stdout
    shell(clone, "dvc", "pull", "data/prompts", env=storage.reader)
    (clone / "data/prompts/mine.csv").write_text("prompt\n")
    shell(clone, "dvc", "commit", "--force", "prepare_prompts")
    assert "Access Denied" in shell(clone, "dvc", "push", "data/prompts", fails=True, env=storage.reader).stdout


def test_a_damaged_or_missing_object_is_said_and_not_trained_on(clone: Path, published: Path, storage: Storage) -> None:
    lock = yaml.safe_load((published / "dvc.lock").read_text())["stages"]["score"]["outs"]
    folder = next(out["md5"] for out in lock if out["path"] == "data/pairs")
    listing = json.loads(storage.object(folder).get()["Body"].read())
    md5 = next(entry["md5"] for entry in listing if entry["relpath"].endswith(".parquet"))
    good = storage.object(md5).get()["Body"].read()
    change(clone, "train", "lr", 0.5)
    train = ("dvc", "repro", "--pull", "--allow-missing", "train")

    storage.object(md5).put(Body=bytes([good[0] ^ 1]) + good[1:])
    said = shell(clone, *train, fails=True, env=storage.reader).stdout
    assert "failed to reproduce 'train'" in said
    assert "data/pairs" in shell(clone, "dvc", "pull", "data/pairs", fails=True, env=storage.reader).stdout

    storage.object(md5).delete()
    assert md5 in shell(clone, *train, fails=True, env=storage.reader).stdout
    assert not (clone / "models/adapter").exists()

    # DVC takes a folder whose listing is there for whole, so that goes too; then whoever has the data pushes again.
    storage.object(folder).delete()
    shell(published, "dvc", "push", "data/pairs", env=storage.writer)
    shell(clone, "dvc", "pull", "data/pairs", env=storage.reader)
    assert contents(clone / "data/pairs") == contents(published / "data/pairs")


def test_without_the_storage_the_message_names_it(clone: Path) -> None:
    shell(clone, "dvc", "remote", "modify", "--local", "storage", "endpointurl", "http://127.0.0.1:9")
    key = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_MAX_ATTEMPTS": "1"}  # waits for no second
    assert "http://127.0.0.1:9" in shell(clone, "dvc", "pull", "models/adapter", fails=True, env=key).stdout


def test_a_folder_is_a_remote(tiny_run: Path, tmp_path: Path) -> None:
    """The committed default: a folder beside the clones."""
    root = Path(shutil.copytree(tiny_run, tmp_path / "root"))
    shell(root, "dvc", "push", "models/adapter")
    shell(tmp_path, "git", "clone", "--quiet", root, "clone")
    shell(tmp_path / "clone", "dvc", "pull", "models/adapter")
    assert contents(tmp_path / "clone/models/adapter") == contents(root / "models/adapter")
    assert "failed to pull" in shell(tmp_path / "clone", "dvc", "pull", "models/reward", fails=True).stdout


class Static(SimpleHTTPRequestHandler):
    """A web server's usual answers: it gives files and takes none."""

    def log_message(self, *_: object) -> None:
        pass


def test_a_web_server_is_read_and_pushes_go_to_a_remote_of_ones_own(tiny_run: Path, tmp_path: Path) -> None:
    """The committed default cannot be written to, by whomever."""
    root = Path(shutil.copytree(tiny_run, tmp_path / "root"))
    (tmp_path / "store").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Static, directory=str(tmp_path / "store"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shell(root, "dvc", "remote", "modify", "storage", "url", f"http://127.0.0.1:{server.server_port}")
        shell(root, "git", "commit", "--quiet", "--all", "--message", "our storage")
        assert "501" in shell(root, "dvc", "push", "models/adapter", fails=True).stdout
        shell(root, "dvc", "remote", "add", "--local", "upload", tmp_path / "store")
        shell(root, "dvc", "push", "--remote", "upload", "models/adapter")
        assert shell(root, "git", "status", "--porcelain").stdout == ""
        shell(tmp_path, "git", "clone", "--quiet", root, "clone")
        shell(tmp_path / "clone", "dvc", "pull", "models/adapter")
        server.shutdown()
    assert contents(tmp_path / "clone/models/adapter") == contents(root / "models/adapter")


@pytest.fixture
def ssh_port(tmp_path: Path) -> Iterator[int]:
    """An SSH server that lets the key ``tmp_path/key`` in."""

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            authorized_client_keys=str(tmp_path / "allowed"), sftp_factory=True,
        )  # fmt: skip

    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(tmp_path / "key")
    key.write_public_key(tmp_path / "allowed")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(listen(), loop).result()
    yield server.get_port()
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_server_with_ssh_is_a_remote(tiny_run: Path, tmp_path: Path, ssh_port: int) -> None:
    root = Path(shutil.copytree(tiny_run, tmp_path / "root"))
    place = f"ssh://127.0.0.1:{ssh_port}{tmp_path}/far"
    shell(root, "dvc", "remote", "modify", "storage", "url", place)
    shell(root, "git", "commit", "--quiet", "--all", "--message", "our storage")
    shell(tmp_path, "git", "clone", "--quiet", root, "clone")
    clone = tmp_path / "clone"
    for folder in (root, clone):
        shell(folder, "dvc", "remote", "modify", "--local", "storage", "user", "dspo")
        shell(folder, "dvc", "remote", "modify", "--local", "storage", "keyfile", str(tmp_path / "key"))
    shell(root, "dvc", "push", "models/adapter")
    shell(clone, "dvc", "pull", "models/adapter")
    assert contents(clone / "models/adapter") == contents(root / "models/adapter")
