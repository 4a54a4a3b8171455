"""What the columns and rows of printed tables mean, in a sentence each."""

from __future__ import annotations

__all__ = ["meaning_of"]

import re

_MEANINGS = {
    # headings of every table
    r"mean": "Mean over the data points.",
    r"± data": "Standard error over the data set: how much the mean would vary with other data of the same kind.",
    r"± Monte Carlo|± MC": "Monte Carlo standard error of the mean: how much it would vary with other samples of z.",
    r"± runs": "Standard error over training runs from different seeds.",
    # of a comparison
    r"log p\(x\)": "Log-likelihood, log p(x): estimated by importance weighting, or exact where the model knows it.",
    r"exact": "Exact log p(x), where the model has it in closed form or a sum or an integral gives it.",
    r"gap|gap = log p\(x\) - ELBO": "Variational gap, log p(x) - ELBO = KL(q(z|x) || p(z|x)): zero for an exact guide.",
    r"approximation": "Approximation gap: what the best member of the guide's family still loses.",
    r"amortization": "Amortization gap: what the encoder loses beside the best member of its family.",
    r"ESS|effective sample size.*": "Effective sample size: how many equally weighted samples carry as much "
    "information. Rows that share a model share one log p(x), and so this number.",
    r"k>0\.7|data points with k-hat > 0\.7": "Share of data points whose Pareto k-hat is above 0.7: their "
    "estimate of log p(x) is unreliable, and usually too low. Rows that share a model share one log p(x), and so "
    "this share.",
    r"k-hat": "Pareto k-hat, the tail index of the importance weights: above 0.7 the estimate is unreliable.",
    r"k>0\.7, guide samples only": "Share of data points whose k-hat is above 0.7 with samples from each guide alone.",
    r"params": "Number of trainable parameters; of the guide alone where all rows share one model.",
    r"seconds": "Wall-clock seconds: of training (where known) and measurement; in a training table, since the start.",
    # rows of a measurement
    r"ELBO": "Evidence lower bound, the mean log weight: what SVI maximizes. It is below log p(x), up to noise.",
    r"log p\(x\), refined": "Log-likelihood from importance sampling with a proposal of its own for each data point.",
    r"log p\(x\), importance-weighted": "Log-likelihood from importance sampling with samples from the guide.",
    r"log p\(x\), exact": "Log-likelihood that the model knows in closed form, or that a sum or an integral gives.",
    r"guide samples only, K = .*": "Log-likelihood from samples of the guide alone: the number that papers report.",
    r"delta-corrected": "The estimate with its bias of order 1/K added back.",
    r"jackknifed": "The jackknife estimate: less bias, more variance.",
    r"Pareto-smoothed": "The estimate with its largest weights smoothed by a fitted Pareto distribution.",
    r".* per feature(, fitted .*)?": "Baseline: log p(x) of independent features, fitted in closed form. A model "
    "below it has learned less than the mean and the variance of each feature.",
    r"evaluations.*": "Evaluations of log p(x, z) for each data point that the refined estimate took; a gradient "
    "counts three.",
    r"modes missed": "Data points for which chains from the prior found a part of the posterior that the proposal "
    "misses.",
    r"not refined|log p\(x\) by": "Why log p(x) does not come from refined proposals.",
    r"tolerance reached": "Share of the data points whose Monte Carlo error was expected to reach the tolerance.",
    r"particles spent": "How many samples were drawn in all.",
    r"weights of zero": "Samples from the guide at which the model has no density.",
    r"exact log p\(x\) omitted": "Why the exact value is not shown, though the model gives one.",
    r"below the baseline": "By how much log p(x) is below the baseline, and the likely reason.",
    # of a calibration
    r"p": "p-value of a test of uniform ranks: below 0.01 / the number of features, the guide is miscalibrated.",
    r"\d+ %": "Share of the true values inside the guide's central interval of this level.",
    r"± of one feature": "Standard error of one feature's share.",
    # curves of training
    r"epoch": "Passes over the training data.",
    r"elbo": "Bound on the training data that the objective reports, averaged over the epoch.",
    r"shaped": "Minus the loss, where the objective is not the bound itself.",
    r"validation": "The objective's bound on the validation data after the epoch.",
    r"rate": "Mean of log q(z|x) - log p(z) on the validation data: nats that z carries.",
    r"distortion": "Mean of -log p(x|z) on the validation data: the error of reconstruction, in nats.",
    r"learning rate|learning_rate": "Learning rate of the optimizer in the epoch, or in the step.",
    r"step": "Steps of the optimizer, one batch each.",
    r"loss": "Minus the bound on the batch of the step.",
    r"smoothed": "The losses, smoothed over neighbouring steps.",
    r"elapsed": "Seconds since the start.",
    # of single data points
    r"data point": "Its place in the data that were measured, counted from 0.",
    r"error": "Monte Carlo standard error of log p(x).",
}


def meaning_of(name: str) -> str:
    """What a heading, or the name of a row, means; empty for names that users gave.

    Example:
        >>> meaning_of("gap")
        'Variational gap, log p(x) - ELBO = KL(q(z|x) || p(z|x)): zero for an exact guide.'
    """
    return next((text for pattern, text in _MEANINGS.items() if re.fullmatch(pattern, name.strip())), "")
