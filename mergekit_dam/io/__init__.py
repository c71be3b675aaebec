"""Files, data and Hub downloads, none of them trusted."""
