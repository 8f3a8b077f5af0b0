"""What foreign shapes need: adapters of other packages' containers and models. Nothing here imports those packages."""
