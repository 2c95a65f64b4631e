"""Where alphas and routing weights come from when nobody gives them by hand."""
