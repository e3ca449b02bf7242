"""From what was asked to a network, its preprocessing and its images.

`source` gives the network (`qdq_source` and `trained_network` where it comes with INT8 scales,
`custom` where a caller of the Python API passes it), `inputs` adds the images (`image_choice`), and
`data_check` judges them before they decide anything.
"""
