"""Model sizes with the settings that go with each optimizer.

The sizes of the paper (Liu et al. 2023, arXiv 2305.14342, section 3 and appendix) share its batch of 480 sequences of
1024 tokens, 100 k steps and 2 k warm-up steps. Where the numbers come from, best source first:

- [code]: configuration files and README table of the authors' code.
- [paper]: the paper, as we know it.
- [recalled]: attributed to the paper from memory, not seen in it. Check before quoting.
- [ours]: our assumption, by the rule that stands with it. Nobody has published it.

`nano` and `micro` are our own, for CPUs.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sophia.config import OPTIMIZERS as OPTIMIZERS
from sophia.model import GPTConfig

# What a curvature estimate is made from, for all sizes. A sixteenth of the batch every tenth step is 0.6 % of the
# gradients' work, and squared in four parts it is nearer to the whole batch's curvature than the official estimate from
# all of it in one part (`sophia bench curvature`). The paper's Sophia-H takes about as much, 32 sequences of 480. In a
# small step a part for each chunk is more than a sixteenth, but at most a quarter: 2.5 % of the work.
CURVATURE_INTERVAL = 10
CURVATURE_CHUNKS = 4
_CURVATURE_SHARE = 16
_LARGEST_CURVATURE_SHARE = 4

# What the paper has for all of its sizes.
_PAPER: Mapping[str, Mapping[str, float]] = {
    # [paper]; the code has beta1 0.965
    "sophia-g": {"beta1": 0.96, "beta2": 0.99, "weight_decay": 0.2, "gamma": 0.05},
    "sophia-h": {"beta1": 0.96, "beta2": 0.99, "weight_decay": 0.2, "gamma": 0.01},
    # [code], [paper]
    "adamw": {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1},
    # betas [paper]; decay [recalled]
    "lion": {"beta1": 0.95, "beta2": 0.98, "weight_decay": 0.2},
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One model size with its schedule and, per optimizer, its settings."""

    name: str
    """What the command line calls it."""
    layers: int
    """Transformer blocks."""
    heads: int
    """Attention heads in each block."""
    width: int
    """Size of the residual stream."""
    context: int
    """Tokens in a sequence."""
    tokens_per_step: int
    """Predictions that one update learns from."""
    steps: int
    """Updates of a full run."""
    warmup_steps: int
    """Updates in which the learning rate climbs to its peak."""
    attention_scale_by_layer: bool = False
    """Whether attention scores of layer l are divided by l + 1 as well."""
    recipes: Mapping[str, Mapping[str, float]]
    """Optimizer -> its lr (peak), beta1, beta2, weight_decay, and for Sophia gamma. Lion's betas: of the update, of the
    average. Signum has no beta2; SOAP's is of its statistics, too. Muon's beta1 is its momentum; its lr holds for AdamW
    on the other parameters too, which presumes Muon's update scaled to AdamW's size (torch:
    adjust_lr_fn="match_rms_adamw"). Sophia-K likewise: its betas are those of its matrices."""

    def config(self, vocab_size: int, **changes: Any) -> GPTConfig:
        """The model for a vocabulary, with fields of the preset replaced or others of GPTConfig set."""
        shape: dict[str, Any] = {
            "layers": self.layers,
            "heads": self.heads,
            "width": self.width,
            "context": self.context,
            "attention_scale_by_layer": self.attention_scale_by_layer,
        }
        return GPTConfig(vocab_size=vocab_size, **{**shape, **changes})


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: There is none; the message names the nearest.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "there are"
        others = "" if near else " " + ", ".join(PRESETS)
        raise ValueError(f"model {name!r} is not a preset; {hint}{others}")
    return PRESETS[name]


def paper_recipe(optimizer: str, rows: int) -> Mapping[str, float]:
    """What the paper trains its models with, whatever a preset has found for its size; but for the learning rate.

    Sophia-G estimates from half of the batch in one part (240 of 480 sequences), Sophia-H from a fifteenth (32).

    Args:
        optimizer: "sophia-g", "sophia-h", "adamw" or "lion".
        rows: Sequences in a step.

    Raises:
        ValueError: The paper has no settings for this one.
    """
    if optimizer not in _PAPER:
        raise ValueError(
            f"recipe is paper, which has no settings for {optimizer}: leave it out; it has some for {', '.join(_PAPER)}"
        )
    curvature = {
        "sophia-g": {"eps": 1e-12, "curvature_rows": max(1, rows // 2), "curvature_chunks": 1},
        "sophia-h": {"eps": 1e-12, "curvature_rows": max(1, rows * 32 // 480)},
    }
    return {**_PAPER[optimizer], **curvature.get(optimizer, {})}


def default_curvature(rows: int) -> tuple[int, int]:
    """Sequences of a step's so many that curvature is estimated from, and the chunks that they are dealt to."""
    chosen = max(min(rows // _LARGEST_CURVATURE_SHARE, CURVATURE_CHUNKS), rows // _CURVATURE_SHARE, 1)
    return chosen, min(CURVATURE_CHUNKS, chosen)


def _recipes(
    *,
    adamw: float,
    lion: float,
    muon: float,
    sophia_g: float,
    sophia_h: float,
    sophia_k: float | None = None,
    **sophia_g_settings: float,
) -> Mapping[str, Mapping[str, float]]:
    """The paper's recipes for the given peak learning rates: what does not change with the size stands here."""
    recipes: dict[str, dict[str, float]] = {
        "adamw": {"lr": adamw, **_PAPER["adamw"]},
        # [ours]: AdamW's learning rate and decay. SOAP's betas are its authors' (arXiv 2409.11321).
        "nadamw": {"lr": adamw, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1},
        "soap": {"lr": adamw, "beta1": 0.95, "beta2": 0.95, "weight_decay": 0.1},
        # [ours]: Lion's, which moves by the same amount; momentum as Sophia's.
        "signum": {"lr": lion, "beta1": 0.96, "weight_decay": 0.2},
        "lion": {"lr": lion, **_PAPER["lion"]},
        # [ours]: AdamW's learning rate and decay. An update of AdamW's root mean square allows that, according to
        # "Muon is Scalable for LLM Training" (arXiv 2502.16982, section 2.2). Momentum 0.95: the same source.
        "muon": {"lr": muon, "beta1": 0.95, "beta2": 0.95, "weight_decay": 0.1},
        "sophia-g": {"lr": sophia_g, **_PAPER["sophia-g"]},
        "sophia-h": {"lr": sophia_h, **_PAPER["sophia-h"]},
        # [ours]: AdamW's learning rate and decay, as of Muon, for the same reason; betas and γ of the pilots in
        # docs/lab-notes.md.
        "sophia-k": {
            "lr": adamw if sophia_k is None else sophia_k,
            **{"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "gamma": 0.05},
        },
    }
    recipes["sophia-g"].update(sophia_g_settings)
    return _frozen(recipes)


def _short(**rates: float) -> Mapping[str, Mapping[str, float]]:
    """Recipes for runs of a few hundred steps, in which a long memory never gets going and curvature starts at zero.

    Searched for nano, on the text and with the schedule of `sophia demo`, one seed: AdamW and Sophia-G in
    docs/demo-sweep.md, the others in three learning rates, a factor of 2 apart, and two values of one other setting;
    but nadamw, signum, soap and sophia-k [ours], not searched: by the rules of `_recipes`, with the others' short
    memories.
    """
    changes = {
        "lion": {"beta1": 0.9},
        "signum": {"beta1": 0.9},
        "muon": {"beta1": 0.9},
        "soap": {"beta1": 0.9},
        "sophia-g": {"beta1": 0.9, "gamma": 0.5},
        "sophia-h": {"beta1": 0.9, "gamma": 0.1},
    }
    return _frozen({name: {**recipe, **changes.get(name, {})} for name, recipe in _recipes(**rates).items()})


def _frozen(recipes: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
    return MappingProxyType({name: MappingProxyType(dict(recipe)) for name, recipe in recipes.items()})


def _paper(name: str, **settings: Any) -> Preset:
    """A size of the paper: the same data and schedule for all."""
    return Preset(name=name, context=1024, tokens_per_step=480 * 1024, steps=100_000, warmup_steps=2_000, **settings)


def _table(*presets: Preset) -> Mapping[str, Preset]:
    return MappingProxyType({preset.name: preset for preset in presets})


PRESETS: Mapping[str, Preset] = _table(
    Preset(
        name="nano",  # 0.9 M parameters with a vocabulary of 1024
        layers=4,
        heads=2,
        width=128,
        context=128,
        tokens_per_step=16 * 128,
        steps=500,
        warmup_steps=250,
        # sophia_k [ours], not searched yet: where Muon was best on another text.
        recipes=_short(adamw=8e-3, lion=1e-3, muon=8e-3, sophia_g=2e-3, sophia_h=2e-3, sophia_k=3.2e-2),
    ),
    Preset(
        name="micro",  # 10.1 M parameters with a vocabulary of 8192
        layers=6,
        heads=5,
        width=320,
        context=256,
        tokens_per_step=32 * 256,
        steps=1000,
        warmup_steps=200,
        # [ours], not searched: nano's, learning rates times nano's width over this one's; sophia_k: as AdamW.
        recipes=_short(adamw=3.2e-3, lion=4e-4, muon=3.2e-3, sophia_g=8e-4, sophia_h=8e-4),
    ),
    _paper(
        "30m",
        layers=6,
        heads=6,
        width=384,
        # All [recalled] but lion, muon: [ours], a sixth of AdamW's as at 125M; as AdamW.
        recipes=_recipes(adamw=1.2e-3, lion=2e-4, muon=1.2e-3, sophia_g=1e-3, sophia_h=1e-3),
    ),
    _paper(
        "gpt2-small",
        layers=12,
        heads=12,
        width=768,
        # adamw, lion, sophia_g [code]; sophia_h [recalled]; muon [ours].
        recipes=_recipes(adamw=6e-4, lion=1e-4, muon=6e-4, sophia_g=6e-4, sophia_h=6e-4),
    ),
    _paper(
        "gpt2-medium",
        layers=24,
        heads=16,
        width=1024,
        attention_scale_by_layer=True,  # [code], for AdamW and for Sophia
        # adamw, lion, sophia_g with its gamma [code]: the last configuration file (earlier: 5e-4 with 0.05; the paper
        # has 4e-4 [recalled]). sophia_h [recalled]; muon [ours].
        recipes=_recipes(adamw=3e-4, lion=1e-4, muon=3e-4, sophia_g=7e-4, gamma=0.08, sophia_h=4e-4),
    ),
    _paper(
        "540m",
        layers=30,  # shape [recalled]
        heads=18,
        width=1152,
        attention_scale_by_layer=True,  # [ours]: as the sizes below and above
        # All [recalled] but lion [ours]: between its neighbours; muon [ours].
        recipes=_recipes(adamw=3e-4, lion=9e-5, muon=3e-4, sophia_g=4e-4, sophia_h=4e-4),
    ),
    _paper(
        "gpt2-large",
        layers=36,
        heads=20,
        width=1280,
        attention_scale_by_layer=True,  # [code]
        # adamw, lion, sophia_g [code]; sophia_h [recalled]; muon [ours].
        recipes=_recipes(adamw=2e-4, lion=8e-5, muon=2e-4, sophia_g=3e-4, sophia_h=3e-4),
    ),
    _paper(
        "gpt2-xl",
        layers=48,  # the paper's 1.5B; OpenAI's GPT-2 XL has 25 heads and a width of 1600
        heads=24,
        width=1536,
        attention_scale_by_layer=True,  # [ours]: as the other deep ones
        # adamw [paper]; sophia_g with gamma and decay: told by an author, not in the paper. sophia_h: not run in the
        # paper, [ours], as sophia_g; lion [ours], 0.4 of AdamW's as at 770M; muon [ours].
        recipes=_recipes(
            adamw=1.2e-4, lion=5e-5, muon=1.2e-4, sophia_g=2e-4, gamma=0.04, weight_decay=0.15, sophia_h=2e-4
        ),
    ),
)
