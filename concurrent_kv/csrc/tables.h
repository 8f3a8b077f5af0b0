/* `share`, `enter` and `mark`: slot tables and what is counted of them. See `plan.py`, `ledger.py` and `slots.py`. */

#ifndef CONCURRENT_KV_TABLES_H
#define CONCURRENT_KV_TABLES_H

#include "arguments.h"
#include "entries.h"

/* share(tables, rows, columns, shared, own, taken, positions, written_at) -> slot tables [entries, window], in bytes
 *
 * The slot tables of entries that share slots with the entries of `tables[rows]`: column c is `columns[c]` of the
 * parent's where `shared[entry, c]`, the next of `taken` where `own[entry, c]`, and 0 elsewhere; where there are as many
 * `columns` as cells, each entry has its own. `positions` are those of the tokens in `taken`, and go into
 * `written_at[slot]`.
 */
static PyObject *share(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    enum { TABLES, COLUMNS, SHARED, OWN, POSITIONS, WRITTEN_AT, ARRAYS };
    static const int dimensions[ARRAYS] = {2, 1, 2, 2, 1, 1}, at[ARRAYS] = {0, 2, 3, 4, 6, 7};
    Py_buffer a[ARRAYS];
    Slots taken = {.view = {.obj = NULL}};
    if (!enough(count, ARRAYS + 2))
        return NULL;
    int got = 0;
    while (got < ARRAYS && array_of(arguments[at[got]], &a[got], dimensions[got],
                                    got == SHARED || got == OWN ? "?" : INT64, got == WRITTEN_AT ? PyBUF_WRITABLE : 0))
        got++;
    PyObject *result = NULL;
    int64_t *rows = NULL;
    Py_ssize_t entries;
    if (got < ARRAYS || !slots_of(arguments[5], &taken, a[WRITTEN_AT].shape[0]) ||
        (rows = rows_of(arguments[1], a[TABLES].shape[0], &entries)) == NULL)
        goto done;
    Py_ssize_t window = a[TABLES].shape[1], tokens = taken.count, next = 0;
    const char *shared = a[SHARED].buf, *own = a[OWN].buf;
    Py_ssize_t cells = entries * window, owned = 0;
    Py_ssize_t step = a[COLUMNS].shape[0] == window ? 0 : window; /* from one entry's columns to the next one's */
    int fits = (!step || a[COLUMNS].shape[0] == cells) && a[POSITIONS].shape[0] == tokens && a[SHARED].len == cells &&
               a[OWN].len == cells;
    for (Py_ssize_t i = 0; fits && i < cells; i++)
        owned += own[i] != 0;
    if (!fits || owned != tokens) {
        PyErr_SetString(PyExc_ValueError, "arrays must be as many entries, columns and tokens");
        goto done;
    }
    if (!all_within(&a[COLUMNS], window, "column"))
        goto done;
    const int64_t *tables = a[TABLES].buf, *columns = a[COLUMNS].buf, *positions = a[POSITIONS].buf;
    result = PyByteArray_FromStringAndSize(NULL, cells * (Py_ssize_t)sizeof(int64_t));
    if (result == NULL)
        goto done;
    int64_t *written_at = a[WRITTEN_AT].buf, *out = (int64_t *)PyByteArray_AS_STRING(result);
    for (Py_ssize_t i = 0; i < tokens; i++)
        written_at[slot_of(&taken, i)] = positions[i];
    for (Py_ssize_t entry = 0; entry < entries; entry++, columns += step)
        for (Py_ssize_t column = 0; column < window; column++, own++, shared++)
            *out++ = *own ? slot_of(&taken, next++) : *shared ? tables[rows[entry] * window + columns[column]] : 0;
done:
    PyMem_Free(rows);
    PyBuffer_Release(&taken.view);
    while (got)
        PyBuffer_Release(&a[--got]);
    return result;
}

static int new_tables(PyObject *object, Py_buffer *view)
{
    if (!PyByteArray_Check(object))
        return array_of(object, view, 2, INT64, 0);
    return PyObject_GetBuffer(object, view, PyBUF_SIMPLE) == 0;
}

/* enter(tables, rows, counts, new, entries)
 *
 * Put the slot tables `new`, an array or what `share` returned, into `tables[rows]` and count one more entry for each of
 * their slots but slot 0; the entries get their rows, their last slots and one reference.
 */
static PyObject *enter(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer a[3];
    if (!enough(count, 5))
        return NULL;
    int got = 0;
    if (array_of(arguments[0], &a[0], 2, INT64, PyBUF_WRITABLE) && ++got &&
        array_of(arguments[2], &a[1], 1, INT32, PyBUF_WRITABLE) && ++got && new_tables(arguments[3], &a[2]))
        ++got;
    PyObject *tails = NULL, *one = NULL;
    int64_t *rows = NULL;
    Py_ssize_t entries;
    if (got < 3 || !all_within(&a[2], a[1].shape[0], "slot") ||
        (rows = rows_of(arguments[1], a[0].shape[0], &entries)) == NULL || !are_entries(arguments[4], entries, 0))
        goto done;
    Py_ssize_t window = a[0].shape[1];
    if (a[2].len != entries * window * (Py_ssize_t)sizeof(int64_t) || (a[2].ndim == 2 && a[2].shape[1] != window) ||
        window < 1) {
        PyErr_SetString(PyExc_ValueError, "new must be [rows, window]");
        goto done;
    }
    one = PyLong_FromLong(1);
    tails = PyList_New(entries);
    const int64_t *new = a[2].buf;
    for (Py_ssize_t i = 0; tails != NULL && i < entries; i++) {
        PyObject *tail = PyLong_FromLongLong(new[(i + 1) * window - 1]);
        if (tail == NULL)
            Py_CLEAR(tails);
        else
            PyList_SET_ITEM(tails, i, tail);
    }
    if (tails == NULL)
        goto done;
    int32_t *counts = a[1].buf;
    for (Py_ssize_t i = 0; i < entries; i++) {
        PyObject *entry = PyList_GET_ITEM(arguments[4], i);
        memcpy((int64_t *)a[0].buf + rows[i] * window, new + i * window, window * sizeof(int64_t));
        put(entry, ROW, Py_NewRef(PyList_GET_ITEM(arguments[1], i)));
        put(entry, TAIL, Py_NewRef(PyList_GET_ITEM(tails, i)));
        put(entry, REFS, Py_NewRef(one));
    }
    for (Py_ssize_t i = 0; i < entries * window; i++)
        counts[new[i]] += new[i] != 0;
done:;
    PyObject *result = tails == NULL ? NULL : Py_NewRef(Py_None);
    Py_XDECREF(one);
    Py_XDECREF(tails);
    PyMem_Free(rows);
    while (got)
        PyBuffer_Release(&a[--got]);
    return result;
}

/* mark(array, slots, number): `array[slots] = number`, of an int32 array. */
static PyObject *mark(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t number;
    Py_buffer array;
    Slots slots;
    if (!enough(count, 3) || !integers(arguments + 2, 1, &number) ||
        !array_of(arguments[0], &array, 1, INT32, PyBUF_WRITABLE))
        return NULL;
    PyObject *result = NULL;
    if (number != (int32_t)number)
        PyErr_Format(PyExc_OverflowError, "number must be an int32, got %zd", number);
    else if (slots_of(arguments[1], &slots, array.shape[0])) {
        for (Py_ssize_t i = 0; i < slots.count; i++)
            ((int32_t *)array.buf)[slot_of(&slots, i)] = (int32_t)number;
        PyBuffer_Release(&slots.view);
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&array);
    return result;
}

#endif
