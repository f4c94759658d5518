import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import search
from compression import codec, with_bits
from search import Objective, Tables, measure
from tests.support.table_examples import fifty_layers


@dataclass(frozen=True)
class Halving:
    """A stand-in for a codec: each bit halves the error, and four bytes of scale come on top."""

    bits: int

    def wire_bytes(self, count):
        return 4 + (count * self.bits + 7) // 8

    def expected_squared_error(self, values, projected=False):
        assert values.ndim == 1
        return float(values.square().sum()) / (4**self.bits + projected)


def two_layers(**changes):
    fields = {
        "layers": ["a", "b"],
        "widths": [2, 4],
        "error": [[2.0, 1.0], [6.0, 3.0]],
        "nbytes": [[10, 20], [30, 60]],
        "dense_bytes": 8,
        "values": 100,
        "numel": [40, 58],
    }
    return Tables(**{**fields, **changes})


def test_no_module_has_the_name_of_a_public_function():
    modules = {path.stem for path in Path(search.__file__).parent.glob("*.py")}
    assert not modules & set(search.__all__)


def test_a_measured_error_is_the_root_of_the_expected_squared_error():
    m = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.arange(6.0).view(2, 3)}
    tables = measure(m, Halving, range(1, 4), dense_bytes=12, values=11)
    norms = [math.sqrt(25), math.sqrt(55)]
    assert np.allclose(tables.error, [[norm / 2**bits for bits in (1, 2, 3)] for norm in norms], rtol=1e-12)
    assert tables.nbytes.tolist() == [[5, 5, 5], [5, 6, 7]]
    assert (tables.layers, tables.widths, tables.numel) == (("a", "b"), (1, 2, 3), (2, 6))
    assert (tables.dense_bytes, tables.values) == (12, 11)


def test_measures_are_of_one_error_and_know_the_norm_of_all_layers():
    m = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.arange(6.0).view(2, 3)}
    root, square = (measure(m, Halving, range(1, 4), 12, 11, by) for by in ("root", "square"))
    assert (root.measure, square.measure) == ("root", "square")
    assert np.allclose(root.error**2, square.error, rtol=1e-12)
    assert root.norm2 == square.norm2 == 25 + 55


def test_with_error_feedback_errors_are_those_of_the_projection():
    m = {"a": torch.tensor([3.0, 4.0])}
    tables = measure(m, Halving, [1, 2], 0, 2, "square", projected=True)
    assert np.allclose(tables.error, [[25 / 5, 25 / 17]], rtol=1e-12)


def test_bytes_are_what_the_caller_says_that_is_sent():
    m = {"a": torch.ones(2), "b": torch.ones(3)}
    tables = measure(m, Halving, [1, 2], 0, 5, nbytes_of=lambda name, width: 100 * ord(name) + width)
    assert tables.nbytes.tolist() == [[9701, 9702], [9801, 9802]]


def test_errors_by_loss_are_given_and_may_be_negative():
    m = {"a": torch.ones(2), "b": torch.ones(3)}
    tables = measure(m, Halving, [1, 2], 0, 5, "loss", loss_of=lambda name, width: (0.5 - width) * len(m[name]))
    assert tables.error.tolist() == [[-1.0, -3.0], [-1.5, -4.5]]
    with pytest.raises(ValueError, match="need the loss of each layer and width"):
        measure(m, Halving, [1, 2], 0, 5, "loss")
    with pytest.raises(ValueError, match="error must be finite, got nan for a at 1 bits"):
        measure(m, Halving, [1, 2], 0, 5, "loss", loss_of=lambda name, width: math.nan)


@pytest.mark.parametrize("name", with_bits())
@pytest.mark.parametrize("projected", [False, True])
def test_a_layer_whose_gradient_is_zero_loses_nothing(name, projected):
    tables = measure({"a": torch.zeros(600)}, lambda bits: codec(name, bits=bits), [2, 8], 0, 600, projected=projected)
    assert not tables.error.any()
    assert tables.norm2 == 0


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e19, 1e30])
def test_errors_of_any_size_are_known(size):
    values = torch.linspace(-1, 3, 600)
    ordinary, extreme = (
        measure({"a": values * factor}, lambda bits: codec("maxmin", bits=bits), [2, 8], 0, 600) for factor in (1, size)
    )
    assert np.allclose(extreme.error, ordinary.error * size, rtol=1e-3)
    assert extreme.norm2 == pytest.approx(ordinary.norm2 * size**2, rel=1e-3)


def test_max_min_tables_hold_the_codecs_bytes_and_lose_less_with_every_bit():
    m = {"weight": torch.randn(64, 24, generator=torch.Generator().manual_seed(0))}
    tables = measure(m, lambda bits: codec("maxmin", bits=bits, bucket_size=512), range(1, 9), 0, 1536)
    assert tables.nbytes.tolist() == [[3 * (8 + 64 * bits) for bits in range(1, 9)]]
    assert (np.diff(tables.error[0]) < 0).all()
    assert 0 < tables.error[0, -1] < 0.05 * tables.error[0, 0]


def test_a_model_without_compressed_layers_has_nothing_to_search():
    with pytest.raises(ValueError, match="at least one compressed layer and one width, got 0 and 3"):
        measure({}, Halving, range(1, 4), dense_bytes=12, values=3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_measuring_names_the_layer_that_is_not_finite(bad):
    m = {"good": torch.ones(4), "bad": torch.tensor([1.0, bad])}
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity in bad"):
        measure(m, Halving, [2], dense_bytes=0, values=6)


def test_an_assignment_is_worth_its_total_error_and_all_bytes_sent():
    tables = two_layers()
    assert tables.total_error((2, 4)) == 5.0
    assert tables.encoded_bytes((2, 4)) == 70
    assert tables.ratio((2, 4)) == (70 + 8) / 400
    assert tables.bits_a_value((2, 4)) == 8 * 70 / 98
    assert Objective(tables, 2.0, 1.0)((2, 4)) == 25 * 0.195


def test_tables_keep_their_own_copy_that_nobody_can_write_to():
    error = np.ones((2, 2))
    tables = two_layers(error=error)
    error[0, 0] = 7
    assert tables.error[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        tables.nbytes[0, 0] = 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": []}, "at least one compressed layer and one width, got 0 and 2"),
        ({"widths": []}, "at least one compressed layer and one width, got 2 and 0"),
        ({"layers": ["a", "a"]}, "distinct names"),
        ({"widths": [4, 2]}, r"must ascend within 1 to 8 bits, got \[4, 2\]"),
        ({"widths": [2, 9]}, r"must ascend within 1 to 8 bits, got \[2, 9\]"),
        ({"error": [[1.0, 1.0]]}, r"error must be \[layers, widths\] = \(2, 2\), got \(1, 2\)"),
        ({"nbytes": [1, 2]}, r"nbytes must be \[layers, widths\] = \(2, 2\), got \(2,\)"),
        (
            {"error": [[1, 1], [1, math.nan]]},
            "error must be finite and not negative, got nan for b at 4 bits",
        ),
        ({"error": [[1, -1], [1, 1]]}, r"error must be finite and not negative, got -1\.0 for a at 4 bits"),
        ({"nbytes": [[1, 1], [0, 1]]}, "nbytes must be above 0, got 0 for b at 2 bits"),
        ({"measure": "cube"}, "a measure is one of root, square, loss, got 'cube'"),
        ({"measure": "loss", "error": [[1, math.inf], [1, 1]]}, "error must be finite, got inf for a at 4 bits"),
        ({"norm2": -1.0}, r"norm2 must be finite and not negative, got -1\.0"),
        ({"dense_bytes": -1}, "got -1 and 100"),
        ({"values": 0}, "got 8 and 0"),
        ({"numel": [5]}, "numel must be above 0 for each of 2 layers"),
        ({"numel": [5, 0]}, "numel must be above 0 for each of 2 layers"),
    ],
)
def test_tables_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        two_layers(**changes)


@pytest.mark.parametrize("bits", [(2,), (2, 3), (2, 4, 4)])
def test_an_assignment_outside_the_tables_is_refused(bits):
    with pytest.raises(ValueError, match=r"each of 2 layers one of the widths \[2, 4\], got"):
        two_layers().ratio(bits)


def test_bits_a_value_need_the_layers_sizes():
    with pytest.raises(ValueError, match="got Tables without numel"):
        two_layers(numel=()).bits_a_value((2, 4))


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_powers_must_be_above_zero(name, power):
    with pytest.raises(ValueError, match=f"search's {name} must be a finite number above 0, got {power}"):
        replace(Objective(two_layers(), 1.0, 1.0), **{name: power})


@pytest.mark.parametrize(("alpha", "beta"), [(900.0, 1.0), (1.0, 900.0)])
def test_an_objective_outside_of_float64_is_ranked_all_the_same(alpha, beta):
    objective = Objective(two_layers(), alpha, beta)
    assert objective((2, 4)) in (0.0, math.inf)
    better, worse = ((4, 4), (2, 2)) if alpha > beta else ((2, 2), (4, 4))
    assert objective.log(better) < objective.log((2, 4)) < objective.log(worse)


def test_assignments_rank_as_their_objectives_do():
    tables = fifty_layers()
    objective = Objective(tables, 0.5, 2.0)
    choices = np.random.default_rng(0).integers(0, 7, size=(200, 54))
    by_objective = sorted(range(200), key=lambda row: objective(tables.bits(choices[row])))
    assert np.argsort(objective.sort_key(choices)).tolist() == by_objective


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.01, 5.0), (5.0, 0.01)])
def test_no_error_ranks_before_any_error_and_fewer_bytes_before_more(alpha, beta):
    tables = two_layers(error=[[0, 0], [1e-9, 0]], nbytes=[[1, 10_000], [1, 10_000]])
    choices = np.array([[1, 1], [0, 1], [1, 0], [0, 0]])
    assert np.argsort(Objective(tables, alpha, beta).sort_key(choices)).tolist() == [1, 0, 3, 2]
