"""MOSS-RLHF's weight differences, made here in their format from a small Llama and recovered."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tensordict import TensorDict
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from ppo_kit.convert import moss
from ppo_kit.convert.moss import CHAT_TEMPLATES, CHECK_SUMS, main, recover
from ppo_kit.data import load_dialogues, load_prompts
from ppo_kit.models import RewardModel
from ppo_kit.sandbox.tokenizer import sandbox_tokenizer


def write(tensors, folder, form, parts=3):
    """As transformers writes shards: ``safetensors`` or ``bin``, in so many files."""
    names = sorted(tensors)
    stem, end = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    files = {name: f"{stem}-{i % parts + 1:05d}-of-{parts:05d}.{end}" for i, name in enumerate(names)}
    if parts == 1:
        files = dict.fromkeys(names, f"{stem}.{end}")
    for file in set(files.values()):
        held = {name: tensors[name].contiguous().clone() for name in names if files[name] == file}
        save_file(held, folder / file) if form == "safetensors" else torch.save(held, folder / file)
    if parts > 1:
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.fixture
def release(tiny_model, tmp_path):
    """``release(kind, form)``: folders of base and difference, and the tuned model's tensors."""

    def make(kind, form="safetensors", parts=3, rotary=False):
        base, tuned = tiny_model("llama"), tiny_model("llama")
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        before, after = dict(base.state_dict()), dict(tuned.state_dict())
        if rotary:  # the buffer that transformers 4.30 saved with each layer
            for layer in range(2):
                name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
                after[name] = tuned.model.rotary_emb.inv_freq.clone()
                before[name] = after[name]
        if kind == "reward":
            after["reward_head.weight"] = torch.randn(1, 16)
        diff = {name: after[name] - before[name] if "layers" in name else after[name] for name in after}
        if rotary:
            before = {name: tensor for name, tensor in before.items() if "rotary" not in name}
        folders = tmp_path / "base", tmp_path / "diff"
        for folder, tensors in zip(folders, ({n: t.half() for n, t in before.items()}, diff), strict=True):
            folder.mkdir()
            base.config.save_pretrained(folder)
            write(tensors, folder, form, parts)
        sandbox_tokenizer().save_pretrained(folders[0])
        # Half precision of the base, as the published Llama-7B: what comes out is float32 arithmetic on it.
        tuned = {
            name: before[name].half().float() + diff[name]
            if "layers" in name and name in before
            else after[name]
            for name in after
        }
        return *folders, tuned

    return make


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["sft", "policy"])
def test_causal_models_come_back_exactly(release, tmp_path, kind, form):
    base, diff, tuned = release(kind, form)
    result = recover(base, diff, tmp_path / "out", kind=kind, shard_bytes=4000)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tuned[name]), name
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert result.total == pytest.approx(sum(t.double().sum().item() for t in tuned.values()))


def test_the_reward_model_scores_as_the_original_head_at_the_last_position(release, tmp_path, tiny_model):
    base, diff, tuned = release("reward")
    result = recover(base, diff, tmp_path / "out", kind="reward")
    original = tiny_model("llama")
    original.load_state_dict({name: tuned[name] for name in original.state_dict()})
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 8]])  # left-padded with 0, <unk> in theirs
    mask = ids != 0
    with torch.no_grad():
        hidden = original.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state[:, -1]
        expected = (hidden @ tuned["reward_head.weight"].T).squeeze(-1)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        got = model(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)
        batch = TensorDict(
            {
                "prompt_ids": ids[:, :3],
                "prompt_mask": mask[:, :3],
                "response_ids": ids[:, 3:],
                "response_mask": mask[:, 3:],
            },
            [2],
        )
        ours = RewardModel(model)(batch)["score"]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert any("lm_head left out" in said for said in result.statements)
    assert (tmp_path / "out" / "model.safetensors").is_file()  # small enough for one file


def test_rotary_buffers_of_old_checkpoints_count_in_the_sum_and_are_not_kept(release, tmp_path):
    base, diff, tuned = release("sft", "bin", parts=1, rotary=True)
    result = recover(base, diff, tmp_path / "out", kind="sft")
    plain = sum(tensor.double().sum().item() for name, tensor in tuned.items() if "rotary" not in name)
    assert result.total == pytest.approx(sum(t.double().sum().item() for t in tuned.values()), rel=1e-6)
    assert result.total > plain + 2
    assert not any(
        "rotary" in name for name in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    )


def test_a_published_sum_is_verified_and_a_mismatch_leaves_nothing(release, tmp_path, monkeypatch, capsys):
    base, diff, tuned = release("sft")
    total = sum(tensor.double().sum().item() for tensor in tuned.values())
    command = ["recover", "--base", str(base), "--diff", str(diff), "--out", str(tmp_path / "out")]
    monkeypatch.setitem(CHECK_SUMS, ("en", "sft"), total * (1 + 2e-5))
    assert main([*command, "--kind", "sft", "--release", "en"]) == 2
    assert "a damaged file, or another base" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "diff"]
    monkeypatch.setitem(CHECK_SUMS, ("en", "sft"), total * (1 + 0.5e-5))
    assert main([*command, "--kind", "sft", "--release", "en"]) == 0
    assert "the published check sum" in capsys.readouterr().out
    assert main([*command, "--kind", "sft"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_an_unverified_result_is_reported(release, tmp_path):
    base, diff, _ = release("policy")
    said = recover(base, diff, tmp_path / "a", kind="policy", release="en").statements
    assert "not verified: none is published for en policy" in said[0]
    assert "not verified: no --release" in recover(base, diff, tmp_path / "b", kind="policy").statements[0]


@pytest.mark.parametrize(
    ("language", "human", "assistant"), [("en", "Human:", "Assistant:"), ("zh", "<|Human|>", "<|MOSS|>")]
)
def test_the_tokenizer_comes_along_with_their_template(release, tmp_path, language, human, assistant):
    base, diff, _ = release("policy")
    recover(base, diff, tmp_path / "out", kind="policy", release=language)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"<s>{human}a</s>{assistant}b</s>{human}c</s>{assistant}"
    with pytest.raises(Exception, match="no role system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def spoil(folder, change):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    write(change, folder, "safetensors", parts=1)


def test_wrong_folders_are_named(release, tmp_path):
    base, diff, _ = release("reward")
    tensors = {name: moss.ShardReader(diff)[name] for name in moss.ShardReader(diff)}
    start = {name: moss.ShardReader(base)[name] for name in moss.ShardReader(base)}
    out, norm = tmp_path / "out", "model.layers.1.input_layernorm.weight"

    with pytest.raises(ValueError, match=r"--kind sft: .* holds a reward_head"):
        recover(base, diff, out, kind="sft")
    with pytest.raises(ValueError, match=r"no model.safetensors or pytorch_model.bin"):
        recover(tmp_path, diff, out, kind="reward")
    spoil(base, {name: tensor for name, tensor in start.items() if name != norm})
    with pytest.raises(ValueError, match=f"base lacks 1 tensors: {norm}"):
        recover(base, diff, out, kind="reward")
    write({**start, norm: torch.zeros(8)}, base, "safetensors", parts=1)
    with pytest.raises(
        ValueError, match=r"input_layernorm.weight: \[8\] in the base, \[16\] in the difference"
    ):
        recover(base, diff, out, kind="reward")
    embedding = "model.embed_tokens.weight"
    write({**start, embedding: torch.zeros(20, 16)}, base, "safetensors", parts=1)
    with pytest.raises(ValueError, match="base's vocabulary has 20 tokens, the difference's 17"):
        recover(base, diff, out, kind="reward")
    write(start, base, "safetensors", parts=1)
    spoil(diff, {**tensors, norm: torch.full((16,), float("nan"))})
    with pytest.raises(ValueError, match=f"{norm}: holds a number that is not finite"):
        recover(base, diff, out, kind="reward")
    write({n: t for n, t in tensors.items() if n != embedding}, diff, "safetensors", parts=1)
    with pytest.raises(ValueError, match=f"diff lacks 1 tensors: {embedding}"):
        recover(base, diff, out, kind="reward")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "diff"]


def test_a_bin_file_runs_nothing(release, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    base, diff, tuned = release("sft", "bin", parts=1)
    torch.save({**tuned, "x": Attack()}, diff / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        recover(base, diff, tmp_path / "out", kind="sft")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("language", "human", "assistant", "turns"),
    [
        ("en", "Human:", "Assistant:", ["Hi", "Hello", "Bye"]),
        ("zh", "<|Human|>", "<|MOSS|>", ["你好", "您好", "再见"]),
    ],
)
def test_their_json_reads_through_their_template(tmp_path, language, human, assistant, turns):
    special = ["<s>", "</s>", "<unk>"]
    letters = sorted(set("".join([human, assistant, *turns])))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *letters])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATES[language],
    )
    file = tmp_path / "train.json"
    file.write_text(json.dumps([turns, turns[:2]]))
    prompts = load_prompts(file, theirs, max_tokens=99)
    expected = f"<s>{human}{turns[0]}</s>{assistant}{turns[1]}</s>{human}{turns[2]}</s>{assistant}"
    assert theirs.decode(prompts[0]) == expected
    assert theirs.decode(prompts[1]) == f"<s>{human}{turns[0]}</s>{assistant}"
    assert "MOSS lists of even length" in str(prompts.report)
    answered = load_dialogues(tmp_path / "train.json", theirs, max_tokens=99, on_bad_row="skip")
    assert theirs.decode(answered[0].answer_ids) == f"{turns[1]}</s>"
