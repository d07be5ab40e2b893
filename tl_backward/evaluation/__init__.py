"""Evaluating edits on CounterFact: records, metrics and a runner that batches many edits."""

from tl_backward.evaluation.generation import generate_texts, generate_tokens
from tl_backward.evaluation.methods import (
    Method,
    adam,
    alpha_edit,
    fine_tuning,
    gradient,
    memit,
    mend,
    rome,
    shift,
    unedited,
)
from tl_backward.evaluation.metrics import n_gram_entropy, prompt_metrics
from tl_backward.evaluation.perplexity import perplexity
from tl_backward.evaluation.records import Record, load_records
from tl_backward.evaluation.runner import evaluate
from tl_backward.evaluation.scoring import TargetScores, score_targets, tokenised
from tl_backward.evaluation.summary import summarise, table
from tl_backward.evaluation.tuning import Tuned, tune
from tl_backward.evaluation.wikitext import N_LINES, wikitext_lines

__all__ = [
    "N_LINES",
    "Method",
    "Record",
    "TargetScores",
    "Tuned",
    "adam",
    "alpha_edit",
    "evaluate",
    "fine_tuning",
    "generate_texts",
    "generate_tokens",
    "gradient",
    "load_records",
    "memit",
    "mend",
    "n_gram_entropy",
    "perplexity",
    "prompt_metrics",
    "rome",
    "score_targets",
    "shift",
    "summarise",
    "table",
    "tokenised",
    "tune",
    "unedited",
    "wikitext_lines",
]
