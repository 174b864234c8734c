"""MOSS-RLHF's released models, recovered from their published weight differences::

    python -m ppo_kit.convert.moss recover --base DIR --diff DIR --out DIR --kind reward --release en

The models of "Secrets of RLHF in Large Language Models Part I: PPO" (arXiv 2307.04964) were published as
differences to a base (en: Llama-7B, zh: OpenChineseLLaMA-7B). Only tensors with ``layers`` in their name
hold a difference, W = W_base + W_diff in float32; embeddings, final norm and heads are stored whole. The
reward model is a Llama with ``reward_head`` (Linear hidden -> 1, no bias), read at the last position of a
left-padded sequence: a one-label sequence classifier of transformers with another name for its head.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ppo_kit.convert.shards import ShardReader, ShardWriter

Kind = Literal["reward", "sft", "policy"]
Release = Literal["en", "zh"]

CHECK_SUMS: dict[tuple[str, str], float] = {
    ("en", "reward"): 50810.703125,
    ("en", "sft"): 50874.84765625,
    ("zh", "reward"): 49954.0859375,
}
"""(release, kind) -> the published sum over all elements of all recovered float32 tensors."""
RELATIVE_TOLERANCE = 1e-5

_TEMPLATE = (
    "{{{{ bos_token }}}}{{% for message in messages %}}"
    "{{% if message['role'] == 'user' %}}{human}{{% elif message['role'] == 'assistant' %}}{assistant}"
    "{{% else %}}{{{{ raise_exception('MOSS-RLHF has no role ' + message['role']) }}}}{{% endif %}}"
    "{{{{ message['content'] + eos_token }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
)
CHAT_TEMPLATES: dict[str, str] = {
    "en": _TEMPLATE.format(human="Human:", assistant="Assistant:"),
    "zh": _TEMPLATE.format(human="<|Human|>", assistant="<|MOSS|>"),
}
"""Release -> chat template: turns closed by the end-of-sequence token, then the answer's prefix."""

_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Recovered:
    """What :func:`recover` wrote: ``total``, the sum of all elements, and statements for the user."""

    total: float
    statements: tuple[str, ...]


def recover(
    base: Path,
    diff: Path,
    out: Path,
    *,
    kind: Kind,
    release: Release | None = None,
    shard_bytes: int = 2**30,
) -> Recovered:
    """Add a published difference to its base; write a folder that plain transformers loads.

    One tensor of each side and one output shard are in memory at a time. The result is float32.

    Args:
        base: folder of the base model. diff: folder of the difference, with ``config.json``.
        out: new folder; it appears when everything is written and checked, not before.
        kind: ``reward`` becomes a ``LlamaForSequenceClassification`` with one label, the others a
            ``LlamaForCausalLM``.
        release: whose published check sum is verified and whose chat template is written; None does neither.
        shard_bytes: size of an output file.

    Raises:
        FileExistsError: ``out`` is there and not empty.
        ValueError: a tensor is missing or has another shape; base and difference differ in vocabulary; the
            difference is of another kind; a number is not finite; the check sum is another. Nothing is
            written then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; name a new folder")
    before, after = ShardReader(base), ShardReader(diff)
    config = AutoConfig.from_pretrained(diff, trust_remote_code=False)
    _check_names(before, after, config, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        writer = ShardWriter(building, shard_bytes=shard_bytes)
        total = 0.0
        for name, tensor in _tensors(before, after, config):
            # The published sums are over everything, what is not kept included.
            part = float(tensor.sum(dtype=torch.float64))
            if not math.isfinite(part):
                raise ValueError(f"{name}: holds a number that is not finite")
            total += part
            if not (_is_rotary(name) or (kind == "reward" and name == "lm_head.weight")):
                writer.add("score.weight" if name == "reward_head.weight" else name, tensor)
        writer.close()
        verdict = _verify(total, kind, release)
        _write_config(config, building, kind)
        statements = (verdict, *_copy_tokenizer(base, diff, building, release))
        if kind == "reward" and "lm_head.weight" in after:
            statements += ("lm_head left out: a reward model reads its last hidden state",)
        if out.exists():
            out.rmdir()
        building.chmod(0o755)
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Recovered(total, statements)


def _tensors(base: ShardReader, diff: ShardReader, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the recovered model, float32."""
    for name in diff:
        tensor = diff[name].float()
        if "layers" in name:
            start = _rotary(config) if _is_rotary(name) and name not in base else base[name].float()
            if start.shape != tensor.shape:
                raise ValueError(
                    f"{name}: {list(start.shape)} in the base, {list(tensor.shape)} in the difference"
                )
            tensor = start + tensor
        yield name, tensor


def _check_names(base: ShardReader, diff: ShardReader, config: LlamaConfig, kind: Kind) -> None:
    if ("reward_head.weight" in diff) != (kind == "reward"):
        held = "a" if "reward_head.weight" in diff else "no"
        raise ValueError(
            f"--kind {kind}: {diff.folder} holds {held} reward_head.weight; is it of another kind?"
        )
    with torch.device("meta"):
        needed = set(AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict())
    if kind == "reward" or config.tie_word_embeddings:
        needed -= {"lm_head.weight"}
    for reader, names in ((diff, needed), (base, {name for name in diff if "layers" in name})):
        missing = sorted(name for name in names if name not in reader and not _is_rotary(name))
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(f"{reader.folder} lacks {len(missing)} tensors: {', '.join(missing[:5])}{more}")
    name = "model.embed_tokens.weight"
    if name in base and len(base[name]) != len(diff[name]):
        raise ValueError(
            f"the base's vocabulary has {len(base[name])} tokens, the difference's {len(diff[name])}: it was "
            "made against another base (en: Llama-7B, zh: OpenChineseLLaMA-7B)"
        )


def _is_rotary(name: str) -> bool:
    """A buffer that transformers saved until 4.31 and computes since; counted in the published sums."""
    return name.endswith("rotary_emb.inv_freq")


def _rotary(config: LlamaConfig) -> Tensor:
    size = config.hidden_size // config.num_attention_heads
    return 10000.0 ** -(torch.arange(0, size, 2).float() / size)


def _verify(total: float, kind: Kind, release: Release | None) -> str:
    if release is None:
        return f"sum of all numbers {total:.6f}; not verified: no --release given"
    published = CHECK_SUMS.get((release, kind))
    if published is None:
        return f"sum of all numbers {total:.6f}; not verified: none is published for {release} {kind}"
    if not math.isclose(total, published, rel_tol=RELATIVE_TOLERANCE):
        raise ValueError(
            f"check sum: got {total:.6f}, {published} is published for {release} {kind} (relative tolerance "
            f"{RELATIVE_TOLERANCE}): a damaged file, or another base"
        )
    return f"sum of all numbers {total:.6f}: the published check sum ({published})"


def _write_config(config: LlamaConfig, folder: Path, kind: Kind) -> None:
    config.architectures = ["LlamaForSequenceClassification" if kind == "reward" else "LlamaForCausalLM"]
    config.dtype = torch.float32
    if kind == "reward":
        config.num_labels = 1
    if config.pad_token_id is None:
        config.pad_token_id = 0  # theirs: pad is <unk>; transformers' classifier refuses batches without one
    config.save_pretrained(folder)


def _copy_tokenizer(base: Path, diff: Path, out: Path, release: Release | None) -> list[str]:
    source = next((each for each in (diff, base) if any(each.glob("tokenizer.*"))), None)
    if source is None:
        return ["no tokenizer: neither the difference nor the base has one"]
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    statements = [f"tokenizer of the {'difference' if source == diff else 'base'}"]
    if release is not None:
        (out / "chat_template.jinja").write_text(CHAT_TEMPLATES[release])
        statements.append(f"chat template of MOSS-RLHF ({release})")
    return statements


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ppo_kit.convert.moss", description=__doc__.split("\n")[0].rstrip(":")
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("recover", help="add a published difference to its base")
    command.add_argument("--base", type=Path, required=True, help="folder of Llama-7B or OpenChineseLLaMA-7B")
    command.add_argument("--diff", type=Path, required=True, help="folder of the published difference")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--kind", choices=get_args(Kind), required=True)
    command.add_argument(
        "--release", choices=get_args(Release), help="verify its check sum, write its template"
    )
    chosen = parser.parse_args(arguments)
    try:
        result = recover(chosen.base, chosen.diff, chosen.out, kind=chosen.kind, release=chosen.release)
    except (OSError, ValueError, SafetensorError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{chosen.out}: {chosen.kind} model", *result.statements, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
