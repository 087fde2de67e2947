"""Tiny random models of the causal families of the installed transformers; docs/models.md is written from them.

    python tests/families.py                     # try every family, and write docs/models.md (about 15 minutes)

The sizes are set by name, and those that a family does not have are left out, so that new families need no line here.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kdkit.config import DistillConfig, UsageError
from kdkit.data import load_rows
from kdkit.models import ASSETS, BodyAndHead, examine, load_tokenizer, student_from_layers
from kdkit.train import train

TABLE = Path(__file__).parent.parent / "docs" / "models.md"
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 14_000_000  # parameters; families whose configuration cannot be made smaller by these names are left out
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 1040),
    **{"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "is_decoder": True, "use_mamba_kernels": False},
    **{"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 32, "attention_window": 32},
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    # latent attention
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    # recurrent and hybrid models
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **{"mamba_d_ssm": 64, "mamba_n_groups": 1, "n_groups": 1, "mamba_dt_rank": 4, "mamba_d_conv": 4},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "attn_layer_period": 4, "attn_layer_offset": 1},
    **{"expert_layer_period": 2, "expert_layer_offset": 1},
}
INTRODUCTION = """# Families of models

Written by `python tests/families.py` with transformers {version}: for each family it has, a tiny random teacher and
student. {count} families were tried. A family that *trains* was trained for two steps, stopped, resumed, exported and
loaded again; its metrics before the first step and those of the exported student equal the ones computed from
transformers' own logits for one document at a time. The table is a record and not a list that kdkit reads: each model
is asked before training ([kdkit/models/examination.py](../kdkit/models/examination.py)).

- *packs*: documents that share a row do not see each other. Where they do, a row has one document.
- *head*: what is between the last hidden states and the logits, besides the product with the head; the loss applies it.
- *cuts*: a student can be made of some of the teacher's layers (`student_layers`).
"""
EXTRA = {  # what has to fit together, and does not at these sizes
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds": False},
}


def config_of(name: str):
    """Return a small configuration of a family: of its text model, if it has several."""
    default = CONFIG_MAPPING[name]().get_text_config(decoder=True)
    known = {*default.to_dict(), *default.attribute_map}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    if "kv_lora_rank" in known:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # latent attention has no groups of heads
    return type(default)(**{**sizes, **EXTRA.get(name, {})})


def tiny(name: str, seed: int = 0):
    """Return a random model of a family, whose larger weights make every token depend on the others.

    Raises ValueError if it cannot be made this small.
    """
    try:
        config = config_of(name)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not re.search("A_log|conv", key):
                parameter.mul_(3)
    return model.eval()


def trial(name: str, folder: Path) -> dict[str, str]:
    """Train two steps with a pair of this family, and check all that was computed against transformers alone.

    Returns the columns of docs/models.md. Raises AssertionError if a number is wrong, and ValueError if the family
    cannot be made small.
    """
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "embedded_teacher")
    models = {"teacher": tiny(name), "student": tiny(name, seed=1)}
    for role, model in models.items():
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    config = DistillConfig(
        teacher_model=str(folder / "teacher"), student_model=str(folder / "student"), alpha=0.5, batch_size=2,
        max_train_tokens=400, max_eval_tokens=150, max_length=32, max_steps=2, save_steps=1, eval_steps=None,
        logging_steps=1, use_wandb=False, output_dir=str(folder / "run"),
    )  # fmt: skip
    row = {"family": name, "class": type(models["teacher"]).__name__, "packs": "-", "head": "-", "cuts": "-"}
    try:
        events = train(config)
    except UsageError as error:
        return {**row, "verdict": "refused: " + re.split(r"[:.] [Uu]se ", str(error))[0]}
    documents = load_rows(DistillConfig(**{**vars(config), "packing": False}), load_tokenizer(config))[1]
    _assert_close(events[0], held_out_metrics(models, documents), "before the first step")

    run, final = folder / "run", AutoModelForCausalLM.from_pretrained(folder / "run" / "final", dtype=torch.float32)
    trained = held_out_metrics({**models, "student": final.eval()}, documents)
    _assert_close([event for event in events if "eval/step" in event][-1], trained, "of final/")
    weights = {key: value.clone() for key, value in final.state_dict().items()}
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step_00000002")
    train(config)
    again = AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32).state_dict()
    verdict = "trains"
    if not all(torch.equal(value, again[key]) for key, value in weights.items()):
        repeated = DistillConfig(**{**vars(config), "output_dir": str(folder / "repeated")})
        train(repeated)
        fresh = AutoModelForCausalLM.from_pretrained(folder / "repeated" / "final", dtype=torch.float32).state_dict()
        same = all(torch.equal(value, fresh[key]) for key, value in weights.items())
        assert not same, f"{name}: resumed to another student"
        verdict = "trains, with random numbers of its own: no run of it can be repeated"

    body = BodyAndHead(models["teacher"])
    examine(body, "teacher", documents, torch.device("cpu"))
    head = ["bias"] if getattr(models["teacher"].get_output_embeddings(), "bias", None) is not None else []
    head += [f"scale {body.logit_scale:.4g}"] if body.logit_scale != 1 else []
    head += [f"soft cap {body.soft_cap:g}"] if body.soft_cap is not None else []
    try:
        student_from_layers(models["teacher"], 2)
        cuts = "yes"
    except UsageError:
        cuts = "no"
    row |= {"packs": "yes" if body.packs else "no", "head": ", ".join(head) or "plain", "cuts": cuts}
    return {**row, "verdict": verdict}


@torch.no_grad()
def held_out_metrics(models: dict, documents) -> dict[str, float]:
    """Return the metrics of a teacher and a student from transformers' own logits, for one document at a time."""
    sums = dict.fromkeys(("eval/ce_loss", "eval/teacher_ce_loss", "eval/kl_t1"), 0.0)
    num_items = 0
    for row in documents:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        log_q, log_p = (models[role](ids, use_cache=False).logits[0].log_softmax(-1) for role in ("student", "teacher"))
        sums["eval/ce_loss"] += float(F.nll_loss(log_q, labels, reduction="sum"))
        sums["eval/teacher_ce_loss"] += float(F.nll_loss(log_p, labels, reduction="sum"))
        sums["eval/kl_t1"] += float((log_p.exp() * (log_p - log_q)).sum(-1)[labels != -100].sum())
        num_items += int((labels != -100).sum())
    return {key: value / num_items for key, value in sums.items()}


def _assert_close(event: dict, expected: dict[str, float], what: str) -> None:
    for key, value in expected.items():
        assert abs(event[key] - value) <= 1e-3 * max(1, abs(value)), f"{what}: {key} is {event[key]}, not {value}"


def read_table() -> tuple[str, dict[str, dict[str, str]]]:
    """Return the version of transformers that docs/models.md was written with, and its rows by family."""
    text = TABLE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    return re.search(r"transformers (\S+):", text)[1], table


def main() -> None:
    """Try every family, and write docs/models.md."""
    from tqdm import tqdm

    rows, left_out = [], []
    for name in tqdm(NAMES):
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(trial(name, Path(folder)))
            except ValueError as error:
                left_out.append(f"{name} ({str(error).splitlines()[0][:100]})")
    columns = list(rows[0])
    lines = ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]
    introduction = INTRODUCTION.format(version=transformers.__version__, count=len(rows))
    table = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns), *lines]
    TABLE.write_text("\n".join([introduction, *table, "", "Left out: " + "; ".join(left_out) + "."]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
