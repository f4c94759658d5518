"""The benchmark of a sharded model's bytes: its tables, of figures that are made up."""


from benchmarks.sharded_bytes import CHOICES, CURVES, Bytes, Choice, losses, table


def test_a_row_is_a_mean_over_ranks_and_leaves_out_what_nobody_counted() -> None:
    own = [Bytes(6e6, None, None, 1e6, 2e6), Bytes(8e6, None, None, 1e6, 2e6)]
    codes = [Bytes(None, 0.25e6, 0.5e6, 0.2e6, 0.4e6)]
    *_, first, second = table({Choice(None): own, Choice("maxmin", 4, 8, True): codes})
    assert first == "| float32, gloo's | float32 | 7.000 |  |  | 1.000 | 2.000 | 3.000 |"
    assert second == "| 4 bits | 8 bits, kept |  | 0.250 | 0.500 | 0.200 | 0.400 | 0.600 |"


def test_choices_differ_in_their_words() -> None:
    assert len({str(choice) for choice in CHOICES}) == len(CHOICES)
    assert len({str(choice) for choice in CURVES}) == len(CURVES)


def test_losses_are_those_of_the_last_fifth() -> None:
    *_, row = losses({Choice("none", 32, 16): [[4.0] * 8 + [2.0] * 2, [3.0] * 10, [1.0] * 10]})
    assert row == "| float32 | bfloat16 | 2.0000, 3.0000, 1.0000 | 2.0000 |"
