"""Taking the rows whose logits are wanted as early as a graph allows: behind the last attention, a prompt's other tokens are of no use."""

from __future__ import annotations

from .graph import OUTPUTS, Array, Graph, Node

# What makes a row of the same rows of its inputs, and of no others.
_BY_ROW = {
    "activate",
    "add",
    "add_vector",
    "gated_linear",
    "linear",
    "mixture_of_experts",
    "multiply",
    "rms_norm",
    "scale",
    "sigmoid_gate",
    "soft_cap",
}


def take_rows_early(graph: Graph) -> Graph:
    """A graph of the same logits, in which what nothing but ``take_rows`` depends on is made for the rows that it takes alone."""
    narrow: set[int] = set()  # the nodes that are to work on those rows, and take_rows itself

    def for_outputs(node: Node) -> bool:
        users = graph.users.get(node.output, [])
        return bool(users) and all(id(user) in narrow for user in users)

    for node in reversed(graph.nodes):
        if node.op == "take_rows" or (node.op in _BY_ROW and for_outputs(node)):
            narrow.add(id(node))
    wanted = dict.fromkeys(array for node in graph.nodes if id(node) in narrow for array in node.inputs)
    taken: dict[Array, Array] = {}  # the rows of an array that are wanted
    made: set[Array] = set()
    result = Graph()
    for node in graph.nodes:
        if id(node) not in narrow:
            inputs = tuple(taken[array] if array.rows == OUTPUTS and array in taken else array for array in node.inputs)
            attributes = node.attributes
            if node.op == "attention" and for_outputs(node):
                attributes = attributes | {"for_outputs": True}  # it reads and extends the cache for all, and may leave the others' rows
            result.nodes.append(Node(node.op, inputs, attributes, node.output))
            made.add(node.output)
            continue
        for array in wanted:  # all at once, so that what a product is added to is there before the product
            if array in made and array not in taken:
                taken[array] = Array(OUTPUTS, array.columns)
                result.nodes.append(Node("take_rows", (array,), {}, taken[array]))
        inputs = tuple(taken[array] for array in node.inputs)
        if node.op == "take_rows":
            taken[node.output] = inputs[0]
        else:
            taken[node.output] = Array(OUTPUTS, node.output.columns)
            result.nodes.append(Node(node.op, inputs, node.attributes, taken[node.output]))
    return result
