/* `append`: new tokens from tensors of the caller's into a batch. Its counterpart is in `batch.py`. */

#ifndef CONCURRENT_KV_APPENDS_H
#define CONCURRENT_KV_APPENDS_H

#include "arguments.h"
#include "copies.h"

/* Of larger copies torch has several threads do a part each. */
#define LEAST_BYTES_FOR_TORCH 4194304

enum { DTYPE, IS_CPU, SHAPE, STRIDE, IS_NEG, DATA_PTR, NAMES_OF_TENSOR };

static const char *const tensor_names[NAMES_OF_TENSOR] = {
    "dtype", "is_cpu", "shape", "stride", "is_neg", "data_ptr",
};
static PyObject *name_of[NAMES_OF_TENSOR];

static int intern_tensor_names(void)
{
    for (int i = 0; i < NAMES_OF_TENSOR; i++)
        if (!intern(name_of + i, tensor_names[i]))
            return 0;
    return 1;
}

/* A batch [2, layers, rows, heads, columns, head_dim] of numbers of `item` bytes. */
typedef struct {
    PyObject *tensor, *dtype;
    char *start;
    Py_ssize_t layers, rows, heads, columns, head_dim, item;
} Batch;

/* A caller's tensor; a dimension of layers comes first, of one where it has none. */
typedef struct {
    const char *start;
    Py_ssize_t shape[5], stride[5];
} Source;

/* What asks a tensor returns 1; 0 where torch has to do the copy, which also says what is wrong; below 0 with an
 * exception set. Tensors without plain memory (sparse, nested, wrapped by a transform) raise RuntimeError. */
static int not_plain(void)
{
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError))
        return -1;
    PyErr_Clear();
    return 0;
}

static int answer_is(PyObject *found, PyObject *expected)
{
    if (found == NULL)
        return not_plain();
    Py_DECREF(found);
    return found == expected;
}

static int sizes_of(PyObject *found, int dimensions, Py_ssize_t *out)
{
    if (found == NULL)
        return not_plain();
    int fits = PyTuple_Check(found) && PyTuple_GET_SIZE(found) == dimensions;
    if (fits && !integers(((PyTupleObject *)found)->ob_item, dimensions, out))
        fits = -1;
    Py_DECREF(found);
    return fits;
}

static int address_in(PyObject *tensor, char **out)
{
    PyObject *found = PyObject_CallMethodNoArgs(tensor, name_of[DATA_PTR]);
    if (found == NULL)
        return not_plain();
    *out = PyLong_AsVoidPtr(found);
    Py_DECREF(found);
    return PyErr_Occurred() ? -1 : *out != NULL;
}

/* The memory of a plain tensor like the batch, whose last dimension lies in one piece. */
static int source_of(PyObject *tensor, const Batch *b, int stacked, Source *s)
{
    if (Py_TYPE(tensor) != Py_TYPE(b->tensor))
        return 0;
    s->shape[0] = 1, s->stride[0] = 0;
    int first = !stacked, done = answer_is(PyObject_GetAttr(tensor, name_of[DTYPE]), b->dtype);
    if (done == 1)
        done = answer_is(PyObject_GetAttr(tensor, name_of[IS_CPU]), Py_True);
    if (done == 1)
        done = sizes_of(PyObject_GetAttr(tensor, name_of[SHAPE]), 5 - first, s->shape + first);
    if (done == 1)
        done = sizes_of(PyObject_CallMethodNoArgs(tensor, name_of[STRIDE]), 5 - first, s->stride + first);
    if (done == 1)
        done = answer_is(PyObject_CallMethodNoArgs(tensor, name_of[IS_NEG]), Py_False);
    if (done == 1)
        done = address_in(tensor, (char **)&s->start);
    if (done != 1)
        return done;
    const Py_ssize_t expected[5] = {stacked ? b->layers : 1, b->rows, b->heads, s->shape[3], b->head_dim};
    return !memcmp(s->shape, expected, sizeof expected) && (s->stride[4] == 1 || b->head_dim == 1);
}

/* `bytes` of `count` pieces, which are `step` apart at their source. It may be the batch itself. */
ALWAYS_INLINE void copy_pieces(char *to, const char *from, Py_ssize_t count, Py_ssize_t step, Py_ssize_t bytes)
{
    for (Py_ssize_t i = 0; i < count; i++)
        memmove(to + i * bytes, from + i * step, bytes);
}

static void copy_new(const Batch *b, Py_ssize_t plane, Py_ssize_t end, const Source *s)
{
    Py_ssize_t bytes = b->head_dim * b->item, count = s->shape[3], step = s->stride[3] * b->item;
    if (step == bytes || count == 1)
        bytes *= count, count = 1;
    for (Py_ssize_t layer = 0; layer < s->shape[0]; layer++)
        for (Py_ssize_t row = 0; row < b->rows; row++)
            for (Py_ssize_t head = 0; head < b->heads; head++) {
                Py_ssize_t at = (((plane + layer) * b->rows + row) * b->heads + head) * b->columns + end;
                char *to = b->start + at * b->head_dim * b->item;
                const char *from =
                    s->start + (layer * s->stride[0] + row * s->stride[1] + head * s->stride[2]) * b->item;
                switch (bytes) {
                case 128: copy_pieces(to, from, count, step, 128); break;
                case 256: copy_pieces(to, from, count, step, 256); break;
                default: copy_pieces(to, from, count, step, bytes);
                }
            }
}

/* append(batch, layer, end, keys, values) -> tokens of each row that are new now; 0, with nothing copied, if torch has to.
 *
 * `batch` is (tensor, dtype, address, layers, rows, heads, columns, head_dim, bytes of a number). New tokens go into the
 * columns from `end` on of one layer or, where `layer` is -1, of all, of which keys and values are stacked.
 */
static PyObject *append(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t numbers[6], at[2];
    if (!enough(count, 5))
        return NULL;
    if (!PyTuple_Check(arguments[0])) {
        PyErr_Format(PyExc_TypeError, "batch must be a tuple, got %s", Py_TYPE(arguments[0])->tp_name);
        return NULL;
    }
    PyObject **of_batch = ((PyTupleObject *)arguments[0])->ob_item;
    if (!enough(PyTuple_GET_SIZE(arguments[0]), 9) || !integers(of_batch + 3, 6, numbers) ||
        !integers(arguments + 1, 2, at))
        return NULL;
    Batch b = {of_batch[0], of_batch[1], PyLong_AsVoidPtr(of_batch[2]), numbers[0], numbers[1],
               numbers[2],  numbers[3],  numbers[4],                    numbers[5]};
    int stacked = at[0] == -1;
    Py_ssize_t plane = stacked ? 0 : at[0], end = at[1];
    if (PyErr_Occurred() || !within(plane, b.layers, "layer") || !within(end, b.columns + 1, "end"))
        return NULL;
    Source keys, values;
    char *start;
    int done = address_in(b.tensor, &start);
    if (done == 1)
        done = start == b.start; /* or its user has given it other memory */
    if (done == 1)
        done = source_of(arguments[3], &b, stacked, &keys);
    if (done == 1)
        done = source_of(arguments[4], &b, stacked, &values);
    if (done < 0)
        return NULL;
    Py_ssize_t tokens = done ? keys.shape[3] : 0;
    Py_ssize_t bytes = done ? keys.shape[0] * b.rows * b.heads * tokens * b.head_dim * b.item : 0;
    if (!done || tokens != values.shape[3] || tokens > b.columns - end || bytes >= LEAST_BYTES_FOR_TORCH)
        tokens = 0;
    else if (bytes < LEAST_BYTES_WITHOUT_GIL) {
        copy_new(&b, plane, end, &keys);
        copy_new(&b, b.layers + plane, end, &values);
    }
    else {
        Py_BEGIN_ALLOW_THREADS
        copy_new(&b, plane, end, &keys);
        copy_new(&b, b.layers + plane, end, &values);
        Py_END_ALLOW_THREADS
    }
    return PyLong_FromSsize_t(tokens);
}

#endif
