"""Threads take turns; forked processes continue with one thread."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from members import pair

from jensen.inference import IWAE, evaluate, fit, log_weights
from jensen.kernel.alone import alone


def test_threads_on_one_model_get_the_numbers_of_one_thread_after_the_other():
    model, guide, x = pair("VAE, Bernoulli", "MeanField")
    model.train(), guide.eval()
    expected = [evaluate(model, guide, x, 50, seed=seed, progress=False).log_evidence for seed in range(4)]
    failed, made = [], {}

    def measure(seed):
        try:
            for _ in range(5):
                made.setdefault(seed, []).append(
                    evaluate(model, guide, x, 50, seed=seed, progress=False, compile=False).log_evidence
                )
                log_weights(model, guide, x, particles=3)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=measure, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    for seed in range(4):
        assert len(made[seed]) == 5
        for value in made[seed]:
            torch.testing.assert_close(value, expected[seed], rtol=1e-5, atol=1e-5)
    assert (model.training, guide.training) == (True, False)


def test_training_and_measuring_at_once_is_training_then_measuring():
    model, guide, x = pair("VAE, Bernoulli", "MeanField")
    failed = []

    def train():
        try:
            fit(model, guide, x, IWAE(2), epochs=20, seed=0, progress=False)
        except Exception as error:
            failed.append(error)

    def measure():
        try:
            for _ in range(10):
                evaluate(model, guide, x, 20, progress=False)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=job) for job in (train, measure, train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert model.training


def test_the_lock_is_taken_again_by_its_own_thread_and_given_back_after_an_error():
    with pytest.raises(KeyError), alone(), alone():
        raise KeyError
    taken = threading.Event()

    def take():
        with alone():
            taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(10)
    assert taken.is_set()


_FORK = """
import os, sys, threading, time, warnings
import torch
from jensen.guides import PriorGuide
from jensen.inference import evaluate
from jensen.kernel.alone import alone
from jensen.models import PPCA

torch.set_num_threads(2)
(torch.randn(600, 600) @ torch.randn(600, 600)).exp().sum()  # threads of OpenMP, which a fork does not keep
holding = threading.Event()

def hold():
    with alone():
        holding.set()
        time.sleep(30)

threading.Thread(target=hold, daemon=True).start()
holding.wait()
child = os.fork()
if child == 0:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PPCA(600, 2)
        for _ in range(2):
            evaluate(model, PriorGuide(model), torch.randn(300, 600), 50, progress=False)
    said = [w for w in caught if "this process was forked" in str(w.message)]
    os._exit(0 if len(said) == 1 and torch.get_num_threads() == 1 else 3)
for _ in range(200):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        os._exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
os._exit(4)  # it hangs
"""


def test_a_forked_process_measures_on_one_thread_whoever_held_the_lock():
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _FORK], env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=120)
    assert done.returncode == 0, time.perf_counter() - began
