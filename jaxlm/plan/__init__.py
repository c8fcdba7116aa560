"""Plans: what a run would need and take on hardware one does not have.

    python -m jaxlm.plan --config=configs/llama3_8b.py --target=v5e:16x16

The programs of the run are compiled for the target by its own compiler, from
shapes alone (`programs`, `target`). Two readings follow: of the traced program,
before any compiler (`traced`), and of the compiled one (`hlo`). `chips` has the
hardware's figures, `roofline` the time, `memory` the bytes and what would save
some, `search` the choice among many, `report` the pages.
"""
