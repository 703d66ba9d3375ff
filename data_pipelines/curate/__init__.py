"""Offline curation: shards in, a manifest out that says whether each pair is kept, and if not, why.

    scan        one shard at a time: where each pair lies, its size, caption, language and hashes, and what is wrong with it
    rules       what only the whole corpus can tell: duplicates, leaks of an evaluation set, repeated captions, low scores;
                each is a list of `stages`, which regroup rows by another key through a `shuffle`, and leaves verdicts
    manifest    scans and verdicts joined, the alignment rules applied, every pair decided

Every stage is a pure function from files to files. Each file appears whole or not at all, and rows are in the order of the
shards, so the output is the same bytes for any number of workers.
"""
