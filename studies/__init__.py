"""The experiments behind docs/results: data, methods, measures, and tables made from committed records.

Every study is a folder: programs to run with `python -m studies.<folder>.<program>`, its records (or those of the
recipe of the same name in recipes/results), and tables.md, which its `report` writes from the records. All share
`training` (the loop), `rows` (batches), `records`, `workers` and `tables`. Nothing here is in the wheel.
"""
