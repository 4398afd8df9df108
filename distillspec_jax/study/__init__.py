"""The study of methods and divergences on real text, with models trained from scratch; it resumes where it was stopped.

    python -m distillspec_jax.study --gin_file=runs/study.gin --gin.OUTPUT_DIR="'study'" --gin.DATA_DIR="'data'"

Each finished part is one JSON file in RESULTS_DIR and is not made again; the tables of all parts are printed at the end
and written to RESULTS_DIR/tables.md, with plots beside them.
"""
