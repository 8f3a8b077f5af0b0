/* `gather` and `scatter`: tokens between slots and batches. Their counterparts are in `tensors.py`. */

#ifndef CONCURRENT_KV_COPIES_H
#define CONCURRENT_KV_COPIES_H

#include "arguments.h"

/* Handing the GIL over costs more than a shorter copy. */
#define LEAST_BYTES_WITHOUT_GIL 262144

/* Slots [planes, slots, heads] beside a batch [planes, rows, heads, columns], of `bytes` for each head of a token. */
typedef struct {
    char *slots, *batch;
    Py_ssize_t planes, num_slots, heads, bytes, rows, columns;
} Memory;

/* From the address of the slots, their shape, and the address of the batch. */
static int memory_of(PyObject *const *arguments, Memory *m)
{
    if (!PyTuple_Check(arguments[1])) {
        PyErr_Format(PyExc_TypeError, "shape must be a tuple, got %s", Py_TYPE(arguments[1])->tp_name);
        return 0;
    }
    if (!enough(PyTuple_GET_SIZE(arguments[1]), 4))
        return 0;
    m->slots = PyLong_AsVoidPtr(arguments[0]);
    m->batch = PyLong_AsVoidPtr(arguments[2]);
    Py_ssize_t shape[4];
    if (PyErr_Occurred() || !integers(((PyTupleObject *)arguments[1])->ob_item, 4, shape))
        return 0;
    for (int i = 0; i < 4; i++)
        if (shape[i] < 1) {
            PyErr_Format(PyExc_ValueError, "shape must be positive, got %zd", shape[i]);
            return 0;
        }
    m->planes = shape[0], m->num_slots = shape[1], m->heads = shape[2], m->bytes = shape[3];
    return 1;
}

static inline char *in_slots(const Memory *m, Py_ssize_t plane, int64_t slot)
{
    return m->slots + (plane * m->num_slots + slot) * m->heads * m->bytes;
}

static inline char *in_batch(const Memory *m, Py_ssize_t plane, int64_t row, Py_ssize_t head, int64_t column)
{
    return m->batch + (((plane * m->rows + row) * m->heads + head) * m->columns + column) * m->bytes;
}

/* `bytes` is a constant where the function is inlined with one, which makes the copy a few instructions. */
static inline void copy_row(const Memory *m, Py_ssize_t plane, Py_ssize_t row, const int64_t *slots, Py_ssize_t filled,
                            Py_ssize_t bytes)
{
    for (Py_ssize_t head = 0; head < m->heads; head++) {
        char *to = in_batch(m, plane, row, head, 0);
        for (Py_ssize_t column = 0; column < filled; column++, to += bytes)
            memcpy(to, in_slots(m, plane, slots[column]) + head * bytes, bytes);
    }
}

static void copy_rows(const Memory *m, const int64_t *slots, Py_ssize_t filled)
{
    for (Py_ssize_t plane = 0; plane < m->planes; plane++)
        for (Py_ssize_t row = 0; row < m->rows; row++)
            switch (m->bytes) {
            case 128: copy_row(m, plane, row, slots + row * filled, filled, 128); break;
            case 256: copy_row(m, plane, row, slots + row * filled, filled, 256); break;
            default: copy_row(m, plane, row, slots + row * filled, filled, m->bytes);
            }
}

/* gather(slots, shape, batch, columns, end, filled, tables, rows)
 *
 * The tokens of the slot tables `tables[rows]`, each row's newest before column `end`, into columns 0 to `filled` of a
 * batch of `columns`. What no table fills is slot 0, which is zeros.
 */
static PyObject *gather(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Memory m;
    Py_ssize_t numbers[3];
    Py_buffer tables;
    if (!enough(count, 8) || !memory_of(arguments, &m) || !integers(arguments + 3, 3, numbers) ||
        !array_of(arguments[6], &tables, 2, INT64, 0))
        return NULL;
    Py_ssize_t end = numbers[1], filled = numbers[2], window = tables.shape[1];
    m.columns = numbers[0];
    PyObject *result = NULL;
    int64_t *slots = NULL, *rows = rows_of(arguments[7], tables.shape[0], &m.rows);
    if (rows == NULL || !within(filled, m.columns + 1, "filled") || !within(end, window + 1, "end"))
        goto done;
    slots = PyMem_Calloc(m.rows * filled + 1, sizeof(int64_t));
    if (slots == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t row = 0; row < m.rows; row++) {
        const int64_t *table = (const int64_t *)tables.buf + (rows[row] + 1) * window - end;
        for (Py_ssize_t column = 0; column < end && column < filled; column++) {
            if (!within(table[column], m.num_slots, "slot"))
                goto done;
            slots[row * filled + column] = table[column];
        }
    }
    if (m.planes * m.rows * m.heads * filled * m.bytes < LEAST_BYTES_WITHOUT_GIL)
        copy_rows(&m, slots, filled);
    else {
        Py_BEGIN_ALLOW_THREADS
        copy_rows(&m, slots, filled);
        Py_END_ALLOW_THREADS
    }
    result = Py_NewRef(Py_None);
done:
    PyMem_Free(slots);
    PyMem_Free(rows);
    PyBuffer_Release(&tables);
    return result;
}

/* Differences [planes, kept, heads] of float32, added to the first `corrected` tokens, `kept` at a time. */
typedef struct {
    const char *start;
    Py_ssize_t plane_bytes, kept, corrected;
} Differences;

static inline void add(float *restrict to, const float *restrict one, const float *restrict other, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        to[i] = one[i] + other[i];
}

static void write_tokens(const Memory *m, const int64_t *rows, const int64_t *columns, const Slots *slots,
                         const Differences *d)
{
    Py_ssize_t bytes = m->bytes, step = m->columns * bytes;
    for (Py_ssize_t plane = 0; plane < m->planes; plane++)
        for (Py_ssize_t i = 0; i < slots->count; i++) {
            char *to = in_slots(m, plane, slot_of(slots, i));
            const char *from = in_batch(m, plane, rows[i], 0, columns[i]);
            const char *more = i < d->corrected ? d->start + plane * d->plane_bytes + i % d->kept * m->heads * bytes : NULL;
            for (Py_ssize_t head = 0; head < m->heads; head++, to += bytes, from += step)
                if (more == NULL)
                    memcpy(to, from, bytes);
                else
                    add((float *)to, (const float *)from, (const float *)(more + head * bytes), bytes / 4);
        }
}

/* scatter(slots, shape, batch, rows_of_batch, columns_of_batch, difference, plane_bytes, kept, corrected,
 *         rows, columns, taken)
 *
 * Token `columns[i]` of row `rows[i]` of a batch into slot `taken[i]`, for every i.
 */
static PyObject *scatter(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Memory m;
    Py_ssize_t numbers[5];
    if (!enough(count, 12) || !memory_of(arguments, &m) || !integers(arguments + 3, 2, numbers) ||
        !integers(arguments + 6, 3, numbers + 2))
        return NULL;
    m.rows = numbers[0], m.columns = numbers[1];
    Differences d = {PyLong_AsVoidPtr(arguments[5]), numbers[2], numbers[3], numbers[4]};
    if (PyErr_Occurred())
        return NULL;
    Py_buffer rows, columns;
    Slots slots;
    if (!slots_of(arguments[11], &slots, m.num_slots))
        return NULL;
    PyObject *result = NULL;
    if (!array_of(arguments[9], &rows, 1, INT64, 0))
        goto no_rows;
    if (!array_of(arguments[10], &columns, 1, INT64, 0))
        goto no_columns;
    if (rows.shape[0] != slots.count || columns.shape[0] != slots.count || (d.corrected && d.kept < 1))
        PyErr_SetString(PyExc_ValueError, "rows, columns and slots must be as many");
    else if (all_within(&rows, m.rows, "row") && all_within(&columns, m.columns, "column")) {
        if (m.planes * slots.count * m.heads * m.bytes < LEAST_BYTES_WITHOUT_GIL)
            write_tokens(&m, rows.buf, columns.buf, &slots, &d);
        else {
            Py_BEGIN_ALLOW_THREADS
            write_tokens(&m, rows.buf, columns.buf, &slots, &d);
            Py_END_ALLOW_THREADS
        }
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&columns);
no_columns:
    PyBuffer_Release(&rows);
no_rows:
    PyBuffer_Release(&slots.view);
    return result;
}

#endif
