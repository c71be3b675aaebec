"""Read and write the files of a merge: masks, recovered triggers, and their folder."""
