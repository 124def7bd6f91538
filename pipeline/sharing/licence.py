"""What the licences of weights and data mean for somebody who passes a bank on.

Names of licences are people's own words: they are read for what is usual, and nothing is concluded
from a name that is not known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.encoders.catalogue import NOT_STATED

_NAMES = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1
lgpl-3.0 mit mpl-2.0 ms-pl odbl odc-by ofl-1.1 openrail osl-3.0 pddl unlicense wtfpl zlib
"""
HUB_LICENCES = frozenset(_NAMES.split())
"""Identifiers of the Hugging Face hub, https://huggingface.co/docs/hub/repositories-licenses: those
that weights and recordings have."""
OTHER_NAMES = {
    "apache": "apache-2.0", "apache-license-2.0": "apache-2.0", "apache2": "apache-2.0",
    "cc0": "cc0-1.0", "cc-0": "cc0-1.0", "public-domain": "pddl", "mit-license": "mit",
    "odc-by-1.0": "odc-by", "odbl-1.0": "odbl",
}  # fmt: skip
RESEARCH = ("noncommercial", "researchonly", "researchuse", "researchpurpose", "forresearch",
            "academic")  # fmt: skip
UNSTATED = ("", NOT_STATED, "unknown", "none")


def is_stated(licence: str | None) -> bool:
    """Whether somebody named a licence."""
    return (licence or "").strip().lower() not in UNSTATED


def hub_identifier(licence: str | None) -> str:
    """A licence as the hub names it: "unknown" where nobody named one, "other" where the hub has no
    name for it."""
    if not is_stated(licence):
        return "unknown"
    name = re.sub(r"[\s_]+", "-", str(licence).strip().lower())
    name = OTHER_NAMES.get(name, name)
    return name if name in HUB_LICENCES else "other"


def is_non_commercial(licence: str) -> bool:
    """Whether a licence's name says that commercial use is not allowed."""
    squashed = "".join(_words(licence))
    return "nc" in _words(licence) or any(word in squashed for word in RESEARCH)


def allows_no_derivatives(licence: str) -> bool:
    """Whether a licence's name says that nothing may be made of the work."""
    return "nd" in _words(licence) or "noderiv" in "".join(_words(licence))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def licence_warnings(bank: Bank, *, data_licence: str | None = None) -> tuple[str, ...]:
    """What to think of before a bank is passed on, one sentence each; none where its licences are
    named and allow it."""
    encoder = shown(str(bank.card["encoder"]["name"]))
    weights = str(bank.card["licence"])
    found = []
    if not is_stated(weights):
        found.append(
            f"the licence of {encoder}'s weights is not stated; ask who published them before you "
            "pass tokens on"
        )
    if not is_stated(data_licence):
        found.append(
            "the licence of the recordings is not known; name it with --data-licence, and ask "
            "before you pass tokens on"
        )
    named = {f"{encoder}'s weights": weights, "the recordings": data_licence or ""}
    for what, licence in named.items():
        found += [f"the licence of {what}, {shown(licence)}, {one}" for one in _limits(licence)]
    return tuple(found)


def _limits(licence: str) -> Iterator[str]:
    if is_non_commercial(licence):
        yield "allows no commercial use: whoever gets the bank is bound by that"
    if allows_no_derivatives(licence):
        yield "allows no derivatives, and tokens may be one: ask before you pass them on"
