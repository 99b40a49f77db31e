"""Labels that may be trained on."""

from __future__ import annotations

from dataclasses import replace

from label_world import label, pair
from selfeval.labelling.training import labels_key, preferences, training_key, training_labels
from selfeval.records import Label


def trained(given: Label) -> Label:
    return replace(given, for_training=True)


def test_only_labels_for_training_are_preferences() -> None:
    one, two = pair(0), pair(1)
    given = [label(one, "first"), trained(label(two, "first", turned=True))]
    assert training_labels(given) == given[1:]
    assert preferences([one, two], given) == {two.key: "second"}


def test_skipped_undone_disputed_and_foreign_labels_are_no_preferences() -> None:
    pairs = [pair(n) for n in range(5)]
    given = [
        label(pairs[0], "skip"),
        label(pairs[1], "first"),
        label(pairs[1], "undo"),
        label(pairs[2], "first", "ann"),
        label(pairs[2], "second", "bob"),
        label(pairs[3], "first", texts="other"),
        label(pairs[4], "tie"),
    ]
    assert preferences(pairs, map(trained, given)) == {pairs[4].key: "tie"}


def test_a_label_of_other_texts_does_not_hide_one_for_training() -> None:
    one = pair(0)
    given = [trained(label(one, "first")), trained(label(one, "second", texts="other"))]
    assert training_labels(given) == given
    assert preferences([one], given) == {one.key: "first"}


def test_the_key_of_the_pairs_stage_depends_on_labels_for_training_alone() -> None:
    one = pair(0)
    assert (training_key([]), labels_key([])) == ("", "")
    given = [label(one, "first")]
    assert training_key(given) == ""
    assert labels_key(given) != ""
    given.append(trained(label(one, "first")))
    with_label = training_key(given)
    given.append(trained(replace(label(one, "first"), time="2027-01-01T00:00:00+00:00")))
    assert training_key(given) == with_label != "", "the same answer at another time"
    given.append(trained(label(one, "second")))
    assert training_key(given) not in ("", with_label)
    given.append(trained(label(one, "undo")))
    assert training_key(given) == ""
