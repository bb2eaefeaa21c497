"""Print the CSV of `dvc exp show` on standard input as a table.

`dvc exp show` itself leaves out columns where the terminal is narrow, those of the parameters first, which tell one
experiment from another.
"""

import sys

import pandas as pd


def main() -> None:
    table = pd.read_csv(sys.stdin, dtype={"Experiment": str, "rev": str}).dropna(axis="columns", how="all")
    if "State" in table:  # DVC shows an experiment that has no figures with those of the commit that it began from
        figures = [name for name in table if name.startswith(("evaluation.", "reward_model."))]
        table[figures] = table[figures].mask(table["State"].notna() & (table["State"] != "Success"))
    table = table.rename(columns=lambda name: name.removeprefix("evaluation.").removeprefix("worlds."))
    print(table.to_string(index=False, na_rep="", float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
