"""The public names of each subpackage, grouped by what a reader wants to do, in the order of the site.

A public name that no group lists, or a listed name that is not public, stops the build and fails a test.
"""

from collections.abc import Iterable

TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "models": {
        "Exactly solvable models": ("PPCA", "FactorAnalysis", "LinearGaussian", "MixtureOfPPCA", "LinearGaussianSSM"),
        "Deep models": ("VAE", "ConditionalVAE", "Hierarchical"),
        "Discrete latents": ("BinaryLatentVAE", "GaussianMixtureVAE"),
        "Priors": ("StandardNormal", "LearnedPrior", "VampPrior", "LaplacePrior", "FlatPrior"),
        "Test cases with curved posteriors": ("Banana", "Ring"),
    },
    "guides": {
        "Amortized guides": ("amortize", "Amortized", "Structured", "Joint", "Through", "Constrained", "Contractive"),
        "Several latent levels": ("Ladder", "BottomUp"),
        "Optimized for each data point": ("SemiAmortized", "Laplace"),
        "The exact posterior and the prior": ("ExactPosterior", "PriorGuide"),
    },
    "families": {
        "Gaussian posteriors": ("MeanField", "FullCovariance", "LowRank", "GaussMarkov"),
        "Other posteriors": ("Mixture", "StudentT", "Delta"),
        "Flows": ("IAF", "MAF", "NeuralSpline", "Sylvester", "Zuko"),
        "Discrete latents": ("BinaryVector", "OneHotCategorical"),
        "Likelihoods of real numbers": ("Gaussian", "Laplace", "ContinuousBernoulli"),
        "Likelihoods of binary data, counts and levels": (
            "Bernoulli",
            "Binomial",
            "Categorical",
            "DiscretizedLogistic",
            "Poisson",
            "NegativeBinomial",
        ),
        "Base classes": ("Family", "Flow"),
    },
    "networks": {
        "Multilayer perceptrons": ("mlp", "gated_mlp", "residual_mlp"),
        "Images and sequences": ("conv_encoder", "conv_decoder", "recurrent"),
        "Covariates, missing values, noise and tied weights": (
            "Conditioned",
            "Masked",
            "GaussianNoise",
            "MaskingNoise",
            "Transposed",
        ),
    },
    "inference": {
        "Train": (
            "fit",
            "History",
            "restore",
            "learning_rates",
            "LearningRates",
            "Callback",
            "CSVLogger",
            "TensorBoardLogger",
        ),
        "Training objectives": (
            "ELBO",
            "IWAE",
            "Renyi",
            "LinearAnnealing",
            "CyclicalAnnealing",
            "Objective",
            "gradient_signal",
            "GradientSignal",
        ),
        "Measure": (
            "evaluate",
            "Evidence",
            "pareto_k",
            "baseline",
            "Baseline",
            "likely_reason",
            "rate_distortion",
            "RateDistortion",
            "PosteriorCollapseWarning",
        ),
        "Compare guides": ("compare", "Comparison", "Row", "gaps", "Gaps", "bounds", "Bounds"),
        "Calibrate": ("calibrate", "Calibration"),
        "Exact values": ("exact_log_evidence", "ExactEvidence", "HasEvidence"),
        "Annealing and upper bounds": ("ais", "AIS", "sandwich", "Sandwich", "Bracket"),
        "Posterior samples by MCMC": ("mcmc_posterior", "PosteriorDraws", "GuideDistance", "MCMCConvergenceWarning"),
        "Impute missing values": ("impute", "Imputation", "held_out", "HeldOut", "HasCompletion"),
        "Simulate, encode, reconstruct": ("simulate", "encode", "decode", "reconstruct"),
        "Log weights and computation": ("log_weights", "terms", "Terms", "log_joint", "float32_products"),
    },
    "datasets": {
        "Load data": ("load", "from_array", "Dataset", "cards", "Card", "Result"),
        "Data beyond memory": ("stream",),
        "Missing values": ("hide",),
        "Synthetic data": ("linear_gaussian", "linear_dynamics", "pinwheel", "bars"),
    },
    "plots": {
        "Training": ("plot_training", "LiveCurves", "plot_learning_rates"),
        "Bounds and gaps": ("plot_bounds", "plot_gaps", "plot_rate_distortion", "plot_signal"),
        "Diagnostics": ("plot_pareto_k", "plot_ess", "plot_ranks", "plot_worst"),
        "Posteriors": ("plot_posterior", "plot_draws"),
        "Latent space": ("plot_latent", "plot_manifold", "plot_traversals", "plot_interpolations"),
        "Images and samples": ("plot_images", "plot_samples", "plot_reconstructions"),
        "Missing values": ("plot_missing", "plot_imputations"),
        "Save a figure": ("save",),
    },
}

# Modules of the package itself that have pages of their own, and what is public in them.
ALONE: dict[str, tuple[str, ...]] = {
    "imputer": ("Imputer",),
    "missing": ("observed_only", "draw_missing", "as_holes", "Observed"),
    "module": ("UniqueModule",),
    "processes": ("apart", "count", "rank"),
    "sources": ("Source",),
}


def grouped(room: str, names: Iterable[str]) -> dict[str, list[str]]:
    """The names of a subpackage under the task that each belongs to; one group without a title where there are none.

    Raises:
        ValueError: if a name has no group, or a group lists a name that is not public.
    """
    names = list(names)
    if room not in TASKS:
        return {"": names}
    listed = [name for group in TASKS[room].values() for name in group]
    if missing := [name for name in names if name not in listed]:
        raise ValueError(f"jensen.{room} has {missing} without a task: add each to TASKS in docs/extensions/tasks.py")
    if extra := [name for name in listed if name not in names or listed.count(name) > 1]:
        raise ValueError(f"TASKS of jensen.{room} lists {extra}, which are not public names of it, or listed twice")
    return {title: list(group) for title, group in TASKS[room].items()}
