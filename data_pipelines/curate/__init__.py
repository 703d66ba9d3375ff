"""Offline curation: shards in, a manifest out that says of every pair whether it is kept, and why not.

    scan       one shard at a time: what a pair is (place, size, caption, language, hashes) and what is wrong with it
    exchange   the same rows grouped by another key (hash band, caption, language), through files
    verdicts   what only the whole corpus can say: copies, leaks of an evaluation set, low scores, crowded concepts
    manifest   the verdicts joined to the scans, shard by shard

The trap: nothing may depend on who computed what when. Every stage is a pure function from files to files, each file
appears whole or not at all, and the order of rows is that of the shards, so any number of workers writes the same bytes.
"""
