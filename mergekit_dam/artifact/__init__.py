"""Files of a merge: masks, recovered triggers, the folder they lie in."""
