"""Every causal family of the installed transformers trains rightly, or is refused in one line: docs/models.md."""

import pytest
import transformers
from families import NAMES, read_table, trial


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_each_family_trains_rightly_or_is_refused_in_one_line(tmp_path, family):
    try:
        row = trial(family, tmp_path)
    except ValueError as error:
        pytest.skip(f"no tiny model: {error}")
    assert "\n" not in row["verdict"]
    version, table = read_table()
    if version == transformers.__version__:
        assert table[family] == row, "docs/models.md is out of date: run python tests/families.py"


def test_table_has_at_least_sixty_families_and_says_what_becomes_of_each():
    _, table = read_table()
    assert sum(row["verdict"] == "trains" for row in table.values()) >= 60
    assert all(row["verdict"].startswith(("trains", "refused: ")) for row in table.values())
    assert {table["llama"]["packs"], table["mamba"]["packs"]} == {"yes", "no"}
