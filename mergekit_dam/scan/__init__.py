"""Find backdoors in the input models, from unlabelled data alone."""
