"""The section of the page on the map of the domain: the picture, a table of clusters, and sentences on weak and thin ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from selfeval.report.drawing import map_chart
from selfeval.report.figures import cells, count, describe, percent
from selfeval.report.map_chart import COLOURS
from selfeval.report.map_points import MapPoint, cut_text, points_fingerprint
from selfeval.report.schema import Cluster, DomainMap, Sample

__all__ = ["map_section", "map_sentences", "sample_anchor", "sample_links"]

FEWEST_FOR_WEAK = 10
"""Fewest questions for a statement about a cluster."""
THIN = 0.5
"""A cluster with less than half of the mean number of questions is thin."""
OVERLAP = 0.1
"""Silhouette below which clusters overlap."""


def map_section(
    found: DomainMap | None, points: Sequence[MapPoint], links: Mapping[str, str], link_text: str
) -> dict[str, Any] | None:
    """Return the content of the section; None without a map.

    Args:
        found: the part of the report.
        points: the points of evaluation/map.json; none if the file is missing. Points of another evaluation are not drawn.
        links: addresses by question id.
        link_text: text of a link.
    """
    if found is None:
        return None
    is_other = bool(points) and found.points_hash not in (None, points_fingerprint(points))
    points = () if is_other else points
    names = [_name(cluster) for cluster in found.clusters]
    label = f"Map of {found.points:,} texts in {len(names)} clusters"
    asked = sum(cluster.questions for cluster in found.clusters)
    return {
        "picture": Markup(map_chart(points, names, label=label, links=links)) if points else "",
        "is_other": is_other,
        "link_text": link_text if any(point.id in links for point in points) else "",
        "last": len(points) - 1,
        "sentences": map_sentences(found),
        "facts": _facts(found),
        "labels": found.labels,
        "rows": [_row(number, cluster, asked) for number, cluster in enumerate(found.clusters)],
    }


def sample_anchor(place: int) -> str:
    """Return the id of a sample on the page."""
    return f"sample-{place}"


def sample_links(points: Sequence[MapPoint], samples: Sequence[Sample]) -> dict[str, str]:
    """Return, by question id, the address on the page of the sample with the question's text.

    Samples have no ids, so a text that several questions or samples have leads nowhere.
    """
    asked, shown = _places([p.text for p in points if p.id]), _places([cut_text(sample.question) for sample in samples])
    ids = [point.id for point in points if point.id]
    return {ids[asked[text]]: f"#{sample_anchor(shown[text])}" for text in asked if text in shown}


def _places(texts: Sequence[str]) -> dict[str, int]:
    """Return the place of each text that occurs once."""
    counts = Counter(texts)
    return {text: place for place, text in enumerate(texts) if counts[text] == 1}


def _name(cluster: Cluster) -> str:
    return ", ".join(cluster.words) or "no typical words"


def _facts(found: DomainMap) -> str:
    drawn = f"{found.points:,} of {found.texts:,} texts, drawn at random" if found.points < found.texts else "All texts"
    return f"{drawn}, by the embedder {found.embedder} and {found.projection}. Distances between far clusters have no meaning."


def _row(number: int, cluster: Cluster, asked: int) -> dict[str, Any]:
    share = f" ({percent(cluster.questions / asked)})" if asked else ""
    figures = (cluster.kept, cluster.accuracy, cluster.confidence)
    return {
        "number": number + 1,
        "colour": number % COLOURS,
        "name": _name(cluster),
        "example": cluster.example,
        "questions": f"{count(cluster.questions)}{share}",
        "seeds": count(cluster.seeds),
        "dropped": count(cluster.dropped),
        "figures": [(*cells(figure), "") for figure in figures],
    }


def map_sentences(found: DomainMap) -> list[str]:
    """Return sentences on the cluster in which the evaluator is the weakest, on thin clusters, and on clusters that overlap."""
    sentences = [_weakest(found), *_thin(found)]
    if found.silhouette is not None and found.silhouette < OVERLAP:
        sentences.append(f"The clusters overlap (silhouette {found.silhouette:.2f}): their borders are arbitrary.")
    elif found.silhouette is not None:
        sentences.append(f"Silhouette of the clusters: {found.silhouette:.2f}.")
    return [sentence for sentence in sentences if sentence]


def _weakest(found: DomainMap) -> str:
    measured = [(n, c) for n, c in enumerate(found.clusters, 1) if c.accuracy.n >= FEWEST_FOR_WEAK]
    if len(measured) < 2:
        return ""
    number, weakest = min(measured, key=lambda row: row[1].accuracy.known)
    others = [c.accuracy for _, c in measured if c is not weakest]
    level = sum(figure.known * figure.n for figure in others) / sum(figure.n for figure in others)
    is_below = weakest.accuracy.ci_high is not None and weakest.accuracy.ci_high < level
    finding = "its interval is below" if is_below else "its interval includes"
    return (
        f"The evaluator is the weakest in cluster {number} ({_name(weakest)}): right on {describe(weakest.accuracy)}, by "
        f"{found.labels}; {finding} the {percent(level)} of the other clusters."
    )


def _thin(found: DomainMap) -> list[str]:
    if not found.clusters:
        return []
    mean = sum(cluster.questions for cluster in found.clusters) / len(found.clusters)
    thin = [(n, c) for n, c in enumerate(found.clusters, 1) if c.questions < THIN * mean]
    if not thin:
        return []
    named = "; ".join(f"cluster {n} ({_name(c)}), {c.questions:,}{_with_seeds(c)}" for n, c in thin)
    return [f"Few questions were asked in {named}. The mean is {mean:.0f} per cluster."]


def _with_seeds(cluster: Cluster) -> str:
    if not cluster.seeds:
        return ""
    return f" next to {cluster.seeds:,} seed{'s' if cluster.seeds > 1 else ''}"
