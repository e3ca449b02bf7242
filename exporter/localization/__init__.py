"""Which layer parts from the last good stage, and by how much.

`probe` makes graphs tell their tensors or take others', `layers` gives the figures of every layer,
`graphs` and `modules` name the one that deviates: of a graph, or of the graph from its module.
"""
