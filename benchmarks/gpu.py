"""A GPU in ten minutes: the contract of models and guides there, the time of a training step and of evidence, memory.

    python benchmarks/gpu.py --device cuda             # at most 10 minutes; --tf32 and --bf16 on request
    python benchmarks/gpu.py --device cpu --quick      # the same code on a CPU, in about a minute: meaningless numbers

Each part is a process with a time limit, which writes what it has after every row; a part that fails or takes too long
leaves the others alone. Contenders of a part are timed in turn, in one process: in every round each runs once, and the
device is waited for before the clock is read. Ratios are of two times of the same round.

| part | what it is |
| --- | --- |
| contract | the suites tests/test_contract.py and tests/device on the device |
| train | a step of Bernoulli VAEs with tanh networks and Adam, data on the device |
| evidence | log p(x) from K particles, per data point and particle |
| memory | peak memory of the device during `evaluate` against K, and during `fit` against the batch |

| contender | what it is |
| --- | --- |
| eager, traced, compiled | `fit` or `evaluate` with the route of that name |
| CUDA graphs | the compiled function, recorded once and replayed (`jensen.graphs.recorded.cuda_graphs`) |
| by hand | PyTorch: the usual step or estimate, not compiled |
| by hand, compiled | loss, gradients and Adam's update in one compiled function; for evidence a chunk |
| by hand, CUDA graphs | the same, recorded once and replayed |
| NumPyro; JAX | one jitted function; if installed |

Output: the tables in results/gpu.md, all results in results/gpu.json, after every part.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import _common as common
import evidence as on_cpu_evidence
import train_step as on_cpu

ROOT = Path(__file__).parents[1]
LIMITS = {"contract": 240, "train": 190, "evidence": 110, "memory": 40}  # seconds
TRAINING = {
    "784-400-20, batch 128": {"hidden": [400], "latent": 20, "particles": 1, "batch": 128, "steps": 100},
    "784-400-20, batch 512": {"hidden": [400], "latent": 20, "particles": 1, "batch": 512, "steps": 100},
    "784-200-200-50, batch 128": {"hidden": [200, 200], "latent": 50, "particles": 1, "batch": 128, "steps": 100},
}
QUICK_TRAINING = {"784-32-4, batch 32": {"hidden": [32], "latent": 4, "particles": 1, "batch": 32, "steps": 4}}
EVIDENCE = {"784-200-200-50, K = 5000": {"particles": 5000, "rows": 500, "data": 4000}}
QUICK_EVIDENCE = {"784-200-200-50, K = 20": {"particles": 20, "rows": 16, "data": 32}}
BASE = {"train": "compiled, CUDA graphs", "evidence": "compiled"}  # compared with the contenders by hand


def wait(device):
    """Wait until the device has finished."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


@contextlib.contextmanager
def route(name):
    """The settings of a route of jensen: the value of ``compile``."""
    from jensen.graphs.recorded import cuda_graphs
    from jensen.graphs.routes import Work

    cuda_graphs("CUDA graphs" in name)
    pays = mock.patch.multiple(Work, pays_capture=lambda _: True, pays_compiling=lambda *_: False)
    try:
        with pays if name == "traced" else contextlib.nullcontext():
            yield {"eager": False, "traced": "auto"}.get(name, True)
    finally:
        cuda_graphs(False)


def jensen_step(name):
    """A contender: epochs of fit, without the first, which traces, compiles and records."""

    def make(setting, device):
        from torch import nn

        from jensen.families import Bernoulli, MeanField
        from jensen.guides import amortize
        from jensen.inference import fit
        from jensen.models import VAE
        from jensen.networks import mlp

        x, hidden, latent = on_cpu.bits(setting).to(device), setting["hidden"], setting["latent"]

        def run(units):
            model = VAE(mlp(latent, hidden[::-1], nn.Tanh), Bernoulli(784, hidden[0]), latent)
            guide = amortize(model, mlp(784, hidden, nn.Tanh), MeanField, context=hidden[-1])
            epochs, clock = 1 + -(-units // setting["steps"]), common.Clock()
            with route(name) as compiled:
                how = {"batch_size": setting["batch"], "seed": 0, "progress": False, "compile": compiled}
                history = fit(model, guide, x, epochs=epochs, scheduler=clock, device=device, **how)
            run.said = {"route": history.route}
            return clock.after_first() / ((epochs - 1) * setting["steps"])

        return run

    return make


def by_hand(kind):
    """A contender: Adam's step in plain PyTorch; ``kind``: "", "compiled", or "CUDA graphs"."""

    def make(setting, device):
        import torch

        torch._dynamo.reset()
        x, net = on_cpu.bits(setting).to(device), on_cpu.by_hand(setting).to(device)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
        values = {name: p.detach().clone() for name, p in net.named_parameters()}
        first, second = ({name: torch.zeros_like(p) for name, p in values.items()} for _ in range(2))
        bias = torch.ones(2, device=device)
        batch = x[: setting["batch"]].clone()

        def usual(x):
            optimizer.zero_grad()
            net(x).backward()
            optimizer.step()

        @torch.no_grad()
        def whole(x):
            return on_cpu.adam_step(net, values, first, second, bias, x)

        step = torch.compile(whole, dynamic=False, fullgraph=True) if kind else usual
        if kind == "CUDA graphs":
            step = recorded(step, batch)
        done = 0

        def steps(units):
            nonlocal done
            wait(device)
            begin = time.perf_counter()
            for rows in on_cpu.batches(setting, x, units):
                done += 1
                if kind:
                    bias.copy_(torch.tensor([1e-3 / (1 - 0.9**done), 1 / (1 - 0.999**done)]))
                step(x[rows.to(device)])
            wait(device)
            return (time.perf_counter() - begin) / units

        return steps

    return make


def recorded(step, batch):
    """A function of a batch as a CUDA graph: its input and its result stay where they are."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(batch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(batch)

    def replay(x):
        batch.copy_(x)
        graph.replay()
        return result

    return replay


def numpyro(setting, device):
    """A contender: NumPyro's step as in train_step.py, on JAX's default device."""
    check_jax(device)
    steps = on_cpu.numpyro_svi(setting)
    return lambda units: steps(units) / units


def check_jax(device):
    """Raise ImportError unless JAX uses the same kind of device."""
    import jax

    if jax.default_backend() != ("gpu" if device != "cpu" else "cpu"):
        raise ImportError(f"JAX runs on {jax.default_backend()}")


TRAINERS = {
    **{name: jensen_step(name) for name in ("eager", "traced", "compiled", "compiled, CUDA graphs")},
    "by hand": by_hand(""),
    "by hand, compiled": by_hand("compiled"),
    "by hand, CUDA graphs": by_hand("CUDA graphs"),
    "NumPyro": numpyro,
}


def jensen_evidence(name):
    """A contender: evaluate on many data points, minus a call on few, which traces and compiles as well."""

    def make(setting, device):
        from jensen.inference import evaluate

        model, guide = on_cpu_evidence.pair()
        few = setting["rows"]
        x = on_cpu_evidence.data(few + setting["data"]).to(device)

        def seconds(x):
            wait(device)
            begin = time.perf_counter()
            with route(name) as compiled:
                how = {"seed": 0, "refine": False, "progress": False, "compile": compiled, "device": device}
                evaluate(model, guide, x, setting["particles"], **how)
            return time.perf_counter() - begin

        seconds(x[:few])
        return lambda _: (seconds(x) - seconds(x[:few])) / (setting["data"] * setting["particles"])

    return make


def evidence_by_hand(kind):
    """A contender: the encoder once per batch, then chunks of particles; the fastest of three sizes of chunks."""

    def make(setting, device):
        import torch
        import torch.nn.functional as F

        torch._dynamo.reset()
        encoder, decoder = (net.to(device) for net in on_cpu_evidence.networks())
        x = on_cpu_evidence.data(setting["data"]).to(device).split(setting["rows"])

        def of(block):
            def log_weights(x, loc, log_scale):
                noise = torch.randn(block, *loc.shape, device=device)
                z = loc + log_scale.exp() * noise
                logits = decoder(z)
                log_p = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
                return log_p - 0.5 * z.square().sum(-1) + (log_scale + 0.5 * noise.square()).sum(-1)  # [block, N]

            mode = "reduce-overhead" if kind == "CUDA graphs" else "default"
            chunk = torch.compile(log_weights, dynamic=False, mode=mode) if kind else log_weights

            @torch.no_grad()
            def run(_):
                wait(device)
                begin = time.perf_counter()
                for rows in x:
                    loc, log_scale = encoder(rows).chunk(2, -1)
                    found = [chunk(rows, loc, log_scale).clone() for _ in range(setting["particles"] // block)]
                    total = torch.cat(found).logsumexp(0) - math.log(setting["particles"])
                assert bool(total.isfinite().all())
                wait(device)
                return (time.perf_counter() - begin) / (setting["data"] * setting["particles"])

            run(0)
            return run

        sizes = sorted({next(k for k in range(b, 0, -1) if setting["particles"] % k == 0) for b in (10, 50, 200)})
        return min((of(block) for block in sizes[: 1 if setting["particles"] < 100 else 3]), key=lambda run: run(0))

    return make


def jax_evidence(setting, device):
    """A contender: evidence.py's jitted estimate, on JAX's default device."""
    check_jax(device)
    run = on_cpu_evidence.jax_jit(setting)
    return lambda _: run(setting["data"]) / (setting["data"] * setting["particles"])


ESTIMATORS = {
    **{name: jensen_evidence(name) for name in ("eager", "traced", "compiled", "compiled, CUDA graphs")},
    "by hand": evidence_by_hand(""),
    "by hand, compiled": evidence_by_hand("compiled"),
    "by hand, CUDA graphs": evidence_by_hand("CUDA graphs"),
    "JAX": jax_evidence,
}


def timings(options, contenders, settings, save):
    """Time all contenders in turn on each setting: seconds per unit in every round, and what each one said."""
    from jensen.checked import shown

    found = {}
    for title, setting in settings.items():
        rows, runs = found.setdefault(title, {}), {}
        for name, make in contenders.items():
            begin = time.perf_counter()
            try:
                if "CUDA" in name and options.device == "cpu":
                    raise ImportError("needs a GPU")
                run = make(setting, options.device)
                each = run(setting.get("steps", 1))  # seconds per step; of an estimate, of which one is enough
                units = setting.get("steps", 1) * max(
                    1, min(20, round(options.seconds / each / setting.get("steps", 1)))
                )
                runs[name] = (run, units)
                rows[name] = {"first": time.perf_counter() - begin, "each": [], **getattr(run, "said", {})}
            except ImportError as error:
                rows[name] = {"error": f"not installed or not usable: {error}"}
            except Exception as error:  # a contender that fails gets a dash in the table, and the reason
                rows[name] = {"error": f"{type(error).__name__}: {shown(str(error))[:300]}"}
            save(found)
        for _ in range(options.rounds):
            for name, (run, units) in runs.items():
                rows[name]["each"].append(run(units))
            save(found)
    return found


def memory(options, save):
    """Peak memory of the device: `evaluate` against K, with 100 data points; `fit` against the batch."""
    import torch

    from jensen.inference import evaluate, fit

    if options.device == "cpu":
        return save({"evaluate": [], "fit": [], "error": "PyTorch counts the memory of a GPU only"})
    found = {"evaluate": [], "fit": []}
    torch.cuda.init()

    def peak(call):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, begin = torch.cuda.memory_allocated(), time.perf_counter()
        call()
        wait(options.device)
        top = torch.cuda.max_memory_allocated()
        return {"seconds": time.perf_counter() - begin, "peak_mb": top / 2**20, "above_mb": (top - before) / 2**20}

    how = {"seed": 0, "progress": False, "device": options.device}
    for K in (100, 1000, 10_000, 100_000):
        (model, guide), x = on_cpu_evidence.pair(), on_cpu_evidence.data(100)
        row = peak(lambda: evaluate(model, guide, x, K, compile=True, refine=False, **how))  # noqa: B023
        found["evaluate"].append({"particles": K, **row, "all_at_once_mb": 4 * 100 * K * 784 / 2**20})
        save(found)
    for batch in (128, 512, 4096):
        (model, guide), x = on_cpu_evidence.pair(), on_cpu_evidence.data(4096)
        row = peak(lambda: fit(model, guide, x, epochs=3, batch_size=batch, compile=True, **how))  # noqa: B023
        found["fit"].append({"batch": batch, **row})
        save(found)
    return found


def contract(options, limit):
    """Run the suites on the device, in a process: the counts of the summary line, and the end of the output."""
    suites = ["tests/device"] if options.quick else ["tests/device", "tests/test_contract.py"]
    workers = "0" if options.device == "cpu" else str(min(12, os.cpu_count() or 1))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    command += ["-n", workers, "--maxprocesses", "12", "--device", options.device]
    command += ["-k", "evaluate"] if options.quick else ["-m", "", "-k", "not of_its_own"]
    begin = time.perf_counter()
    try:
        done = subprocess.run([*command, *suites], capture_output=True, text=True, cwd=ROOT, timeout=limit)
        text, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        said = error.stdout or ""  # bytes or text
        text, code = (said if isinstance(said, str) else said.decode()) + f"\nstopped after {limit} s", None
    lines = text.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "exit": code,
        "summary": lines[-1],
        "failed": failed,
        "seconds": time.perf_counter() - begin,
        "end": lines[-40:],
    }


def as_part(options):
    """Run as the process of one part: write its results to ``--into`` after every row."""
    import torch

    torch.set_num_threads(options.threads)
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    if options.quick:
        options.rounds, options.seconds = 2, 0.02

    def save(found):
        partial = options.into.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(options.into)

    kind = torch.device(options.device).type
    with torch.autocast(kind, torch.bfloat16) if options.bf16 else contextlib.nullcontext():
        if options.part == "train":
            timings(options, TRAINERS, QUICK_TRAINING if options.quick else TRAINING, save)
        elif options.part == "evidence":
            timings(options, ESTIMATORS, QUICK_EVIDENCE if options.quick else EVIDENCE, save)
        else:
            memory(options, save)


def in_process(part, options):
    """The results of a part, up to its time limit."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "found.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--into", str(into)]
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=LIMITS[part])
            note = "" if done.returncode == 0 else f"ended with {done.returncode}: {done.stderr[-2000:]}"
        except subprocess.TimeoutExpired:
            note = f"stopped after {LIMITS[part]} s"
        found = json.loads(into.read_text()) if into.exists() else {}
    return {"found": found, "note": note}


def paired(rows, one, other):
    """The ratios of the times of two contenders in the same rounds: median, least, most; None if one is missing."""
    a, b = (rows.get(name, {}).get("each", []) for name in (one, other))
    ratios = [x / y for x, y in zip(a, b, strict=False)]
    return (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def report(made, results):
    """The tables."""
    parts = [common.made_by(made), f"Device: {made['device']}; products: {made['precision']}."]
    if said := results.get("contract"):
        parts.append(f"Contract on the device: {said['summary']} ({said['seconds']:.0f} s).")
        parts += [f"- {line}" for line in said["failed"][:20]]
    for part, unit, scale in (("train", "ms per step", 1e3), ("evidence", "ns per data point and particle", 1e9)):
        if part not in results:
            continue
        for title, rows in results[part]["found"].items():
            base = BASE[part] if rows.get(BASE[part], {}).get("each") else "compiled"
            cells = []
            for name, row in rows.items():
                each, ratio = row.get("each"), paired(rows, base, name)
                time_of = "-"
                if each:
                    time_of = (
                        f"{scale * statistics.median(each):.3g} ({scale * min(each):.3g} to {scale * max(each):.3g})"
                    )
                over = "-" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"
                cells.append([name, time_of, over, f"{row['first']:.1f}" if "first" in row else row["error"]])
            head = [title, unit, f"time of '{base}' relative to it", "first call, s; or why it is missing"]
            parts.append(common.table(head, cells))
        parts += [f"The part {part} {results[part]['note']}."] * bool(results[part]["note"])
    if found := results.get("memory", {}).get("found"):
        for of, key in (("evaluate", "particles"), ("fit", "batch")):
            cells = [
                [f"{r[key]:,}", f"{r['peak_mb']:,.0f}", f"{r['above_mb']:,.0f}", f"{r['seconds']:.2f}"]
                for r in found[of]
            ]
            if cells:
                parts.append(common.table([f"{of}, {key}", "peak, MB", "increase, MB", "seconds"], cells))
        parts += [f"Memory: {found['error']}."] if "error" in found else []
    return "\n\n".join(parts)


def machine(options):
    """The device in words, and the precision of products."""
    import torch

    name = "the CPU"
    if options.device != "cpu":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    precision = "bfloat16 by autocast" if options.bf16 else "tf32" if options.tf32 else "float32"
    return {
        "device": name,
        "precision": precision,
    }


def main():
    """Run the parts one after the other, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_arguments(parser, rounds=7)
    add = parser.add_argument
    add("--device", default="cuda")
    add("--tf32", action="store_true", help="float32 products with TF32")
    add("--bf16", action="store_true", help="bfloat16 by autocast")
    add("--part", default="", help="run this part as a process (used by the script itself)")
    add("--into", type=Path, help="the file of a part's results (used by the script itself)")
    add("--parts", default=",".join(LIMITS), help="the parts to run")
    options = parser.parse_args()
    if options.part:
        as_part(options)
        return
    begin, results = common.started(), {}
    about, options.into = machine(options), None
    name = "gpu" + "_tf32" * options.tf32 + "_bf16" * options.bf16
    for part in options.parts.split(","):
        results[part] = contract(options, LIMITS[part]) if part == "contract" else in_process(part, options)
        made = common.provenance(__file__, options, begin, **about)
        made["settings"] = {k: v for k, v in made["settings"].items() if k not in ("into", "part")}
        common.write(options, name, made, {"results": results}, report(made, results))
        print(f"{part}: {made['seconds']} s since the start", flush=True)
    print(report(made, results))


if __name__ == "__main__":
    main()
