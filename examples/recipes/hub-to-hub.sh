#!/bin/sh
# hub-to-hub.sh RECIPE OUT ORG/NAME [options of push]
# Models by Hub id (ORG/NAME@REVISION in the recipe) to a merge on the Hub. Sign in first: `hf auth login`, or HF_TOKEN.
set -eu
recipe=$1 out=$2 name=$3
shift 3
mergekit-dam merge "$recipe" "$out"   # out/dam/inputs.json keeps the commits that were merged
mergekit-dam push "$out" "$name" "$@" # private unless --public is among the options; --dry-run prints the card
