"""One layer through the steps of a recipe: from what calibration left of it to its smaller form."""
