"""Figures of SAEs -> pairs that are equal in something, which is better, and what follows.

    equal_tokens        each SAE against the widest dense one trained on as many tokens
    equal_flops         a Switch SAE against dense ones with its operations per token, within 10%
    equal_parameters    a Switch SAE against dense ones with its parameters, within 5%
    equal_error         how many operations a dense SAE would need for a Switch SAE's error,
                        interpolated between the dense ones (linearly in the logarithms)

Room   Dense SAEs have one expert, and the Switch SAE's activation rule. The SAEs of a pair share
       seed, tokens and k.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

_FLOPS, _PARAMETERS = 0.1, 0.05  # how far from equal a pair may be

Entry = dict[str, Any]


def comparisons_of(saes: list[Entry]) -> dict[str, list[Entry]]:
    """The pairs of each kind, with the figures of both SAEs.

    Args:
        saes: entries of comparison.json.

    Returns:
        Kind -> pairs with `sae`, `against`, `fvu`, `against_fvu`, `relative_difference` (negative
        if the first is better), `flops_ratio`, `encoder_flops_ratio`, `parameters_ratio`, `l0`,
        `against_l0`. Those of equal_error have `dense_flops` and `flops_saved` (a factor) instead;
        both are null if no two dense SAEs lie on either side of that error.
    """
    found: dict[str, list[Entry]] = {
        name: [] for name in ("equal_tokens", "equal_flops", "equal_parameters", "equal_error")
    }
    for sae in saes:
        reference = _reference(sae, saes)
        if reference is not None:
            found["equal_tokens"].append(_pair(sae, reference))
        # all other kinds set a Switch SAE against dense ones
        if not _is_switch(sae):
            continue
        dense = [each for each in saes if _is_dense_for(sae, each)]
        for other in dense:
            pair = _pair(sae, other)
            if abs(pair["flops_ratio"] - 1) <= _FLOPS:
                found["equal_flops"].append(pair)
            if abs(pair["parameters_ratio"] - 1) <= _PARAMETERS:
                found["equal_parameters"].append(pair)
        if dense:
            found["equal_error"].append(_at_equal_error(sae, dense))
    return found


def claims_of(saes: list[Entry], comparisons: dict[str, list[Entry]]) -> list[Entry]:
    """The paper's claims, each as `claim`, `holds` and a `sentence` on what was found.

    A claim holds only if it does in every pair, for every seed. A claim without pairs is left out.

    Args:
        saes: entries of comparison.json.
        comparisons: their pairs, from `comparisons_of`.
    """
    by_name = {each["name"]: each for each in saes}
    flops, equal_width = comparisons["equal_flops"], comparisons["equal_parameters"]

    def wider(pair: Entry) -> bool:
        return bool(_of(by_name, pair)[0]["num_features"] > _of(by_name, pair)[1]["num_features"])

    claims = []
    # equal operations: the paper's claim is on wider SAEs, so pairs of equal width do not count
    for claim, pairs in (
        (
            "a Switch SAE has a lower error than a dense one of equal operations a token",
            [pair for pair in flops if wider(pair)],
        ),
        (
            "a Switch SAE has a lower error than a dense one of equal parameters",
            equal_width,
        ),
    ):
        if pairs:
            holds = all(pair["relative_difference"] < 0 for pair in pairs)
            sentence = "; ".join(_sentence(by_name, pair) for pair in pairs)
            claims.append({"claim": claim, "holds": holds, "sentence": sentence})
    # beyond the errors of the dense SAEs nothing can be said, so those pairs don't count
    saved = [each for each in comparisons["equal_error"] if each["flops_saved"] is not None]
    if saved:
        sentence = "; ".join(
            f"{_title(by_name[each['sae']])} has FVU {each['fvu']:.4f}, for which a dense one "
            f"would take {each['flops_saved']:.2g} times the operations"
            for each in saved
        )
        claims.append(
            {
                "claim": "at equal error a Switch SAE takes fewer operations a token",
                "holds": all(each["flops_saved"] > 1 for each in saved),
                "sentence": sentence,
            }
        )
    return claims


def _sentence(by_name: dict[str, Entry], pair: Entry) -> str:
    """A pair's result in words."""
    sae, other = _of(by_name, pair)
    difference = 100 * pair["relative_difference"]
    worse = "higher" if difference > 0 else "lower"
    # "2 times the", "1/8 of the" or, within rounding, "as many"
    share = pair["encoder_flops_ratio"]
    encoder = f"{share:.2g} times" if share > 1.005 else f"1/{1 / share:.3g} of"
    encoder = "as many" if abs(share - 1) <= 0.005 else f"{encoder} the"
    return (
        f"{_title(sae)} has FVU {pair['fvu']:.4f}, {abs(difference):.1f}% {worse} than "
        f"{other['label']} ({pair['against_fvu']:.4f}), with {encoder} encoder operations"
    )


def _title(sae: Entry) -> str:
    return str(sae["label"]) + ("" if sae["seed"] is None else f" (seed {sae['seed']})")


def _of(by_name: dict[str, Entry], pair: Entry) -> tuple[Entry, Entry]:
    return by_name[pair["sae"]], by_name[pair["against"]]


def _is_switch(sae: Entry) -> bool:
    return bool(sae["num_experts"] > 1)


def _alike(a: Entry, b: Entry) -> bool:
    """Whether two different SAEs were trained on the same tokens with the same seed."""
    known = a["train_tokens"] is not None  # a release may not say
    return a is not b and known and all(a[name] == b[name] for name in ("seed", "train_tokens"))


def _is_dense_for(sae: Entry, other: Entry) -> bool:
    same = all(sae[name] == other[name] for name in ("k", "activation"))
    return same and sae["k"] is not None and _alike(sae, other) and not _is_switch(other)


def _reference(sae: Entry, saes: list[Entry]) -> Entry | None:
    """The widest dense SAE with a k, other than this; with its activation rule if possible."""
    dense = [each for each in saes if _alike(sae, each) and not _is_switch(each) and each["k"]]
    own = [each for each in dense if each["activation"] == sae["activation"]]
    widest = max(own or dense, key=lambda each: int(each["num_features"]), default=None)
    if widest is None or _is_switch(sae) or sae["num_features"] <= widest["num_features"]:
        return widest
    return None  # a dense SAE as wide as this is a reference itself


def _pair(sae: Entry, other: Entry) -> Entry:
    flops, against = sae["flops_per_token"], other["flops_per_token"]
    return {
        "sae": sae["name"],
        "against": other["name"],
        "fvu": sae["fvu"],
        "against_fvu": other["fvu"],
        "relative_difference": sae["fvu"] / other["fvu"] - 1,
        "flops_ratio": flops["total"] / against["total"],
        "encoder_flops_ratio": flops["encoder"] / against["encoder"],
        "parameters_ratio": sae["parameters"] / other["parameters"],
        "l0": sae["l0"],
        "against_l0": other["l0"],
    }


def _at_equal_error(sae: Entry, dense: list[Entry]) -> Entry:
    """Interpolate the operations at which dense SAEs would have this SAE's error."""
    by_flops = sorted(dense, key=lambda each: int(each["flops_per_token"]["total"]))
    needed = None
    for less, more in itertools.pairwise(by_flops):
        a, b = less["fvu"], more["fvu"]
        # the first two neighbors with the error between theirs
        if min(a, b) <= sae["fvu"] <= max(a, b) and a != b:
            part = math.log(sae["fvu"] / a) / math.log(b / a)
            few, many = (math.log(each["flops_per_token"]["total"]) for each in (less, more))
            needed = math.exp(few + part * (many - few))
            break
    flops = sae["flops_per_token"]["total"]
    return {
        "sae": sae["name"],
        "fvu": sae["fvu"],
        "flops": flops,
        "dense_flops": needed,
        "flops_saved": None if needed is None else needed / flops,
        "dense_fvu_from_to": [max(d["fvu"] for d in dense), min(d["fvu"] for d in dense)],
    }
