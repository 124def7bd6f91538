"""The type checker that the whole test run uses: shapes, dtypes, and int where float is said."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
