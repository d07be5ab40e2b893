"""Evaluating edits on CounterFact: records, metrics and a runner that batches many edits."""

from tl_backward.evaluation.generation import generate_texts, generate_tokens
from tl_backward.evaluation.methods import Method, fine_tuning, gradient, shift, unedited
from tl_backward.evaluation.metrics import n_gram_entropy, prompt_metrics
from tl_backward.evaluation.perplexity import perplexity
from tl_backward.evaluation.records import Record, load_records
from tl_backward.evaluation.runner import evaluate
from tl_backward.evaluation.scoring import TargetScores, score_targets, tokenised
from tl_backward.evaluation.summary import summarise, table
from tl_backward.evaluation.wikitext import N_LINES, wikitext_lines

__all__ = [
    "N_LINES",
    "Method",
    "Record",
    "TargetScores",
    "evaluate",
    "fine_tuning",
    "generate_texts",
    "generate_tokens",
    "gradient",
    "load_records",
    "n_gram_entropy",
    "perplexity",
    "prompt_metrics",
    "score_targets",
    "shift",
    "summarise",
    "table",
    "tokenised",
    "unedited",
    "wikitext_lines",
]
