"""Public data sets brought into shape: downloads, archives and masks, none of which training needs."""
