/* Loops over entries: their lookup, their making, their references. Their counterparts are in `entries.py` and `index.py`.
 *
 * Entries are Python objects whose slots lie at offsets that `bind` looked up. What a slot held before is let go of only
 * where something else keeps it alive: callers hold locks, under which no finaliser may run.
 */

#ifndef CONCURRENT_KV_ENTRIES_H
#define CONCURRENT_KV_ENTRIES_H

#include <Python.h>
#include <structmember.h>

#include "arguments.h"
#include "sharing.h"

enum {
    KEY, INDEX_KEY, SCOPE, GENERATION, LENGTH, SIDE, PRIORITY, KEY_HASH, CORRECTION, ROW, TAIL, REFS, PINS, PLACE,
    WRITTEN, TICKS, SLOTS_OF_ENTRY
};

static const char *const slot_names[SLOTS_OF_ENTRY] = {
    "key", "index_key", "scope", "generation", "length", "side", "priority", "key_hash", "correction", "row", "tail",
    "refs", "pins", "place", "written", "ticks",
};

static PyTypeObject *entry_type; /* None's type until `bind` */
static Py_ssize_t slot_at[SLOTS_OF_ENTRY];
static PyObject *no_place;

static inline PyObject **slot(PyObject *entry, int which)
{
    return (PyObject **)((char *)entry + slot_at[which]);
}

/* A thread that holds no mutex may look whether a slot is filled, while one that does fills it anew. */
static inline int is_filled(PyObject *entry, int which)
{
#ifdef Py_GIL_DISABLED
    return _Py_atomic_load_ptr_relaxed(slot(entry, which)) != NULL;
#else
    return *slot(entry, which) != NULL;
#endif
}

static inline void fill(PyObject *entry, int which, PyObject *value)
{
#ifdef Py_GIL_DISABLED
    _Py_atomic_store_ptr_release(slot(entry, which), value);
#else
    *slot(entry, which) = value;
#endif
}

static inline void put(PyObject *entry, int which, PyObject *value)
{
    PyObject *before = *slot(entry, which);
    fill(entry, which, value);
    Py_XDECREF(before);
}

/* bind(class, place): the class of entries, and the place of new ones. */
static PyObject *bind(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 2))
        return NULL;
    if (!PyType_Check(arguments[0])) {
        PyErr_Format(PyExc_TypeError, "expected a class, got %s", Py_TYPE(arguments[0])->tp_name);
        return NULL;
    }
    PyTypeObject *type = (PyTypeObject *)arguments[0];
    Py_ssize_t at[SLOTS_OF_ENTRY];
    for (int i = 0; i < SLOTS_OF_ENTRY; i++) {
        PyObject *found = PyObject_GetAttrString(arguments[0], slot_names[i]);
        if (found == NULL)
            return NULL;
        int is_slot = Py_IS_TYPE(found, &PyMemberDescr_Type) && ((PyDescrObject *)found)->d_type == type &&
                      ((PyMemberDescrObject *)found)->d_member->type == T_OBJECT_EX;
        at[i] = is_slot ? ((PyMemberDescrObject *)found)->d_member->offset : 0;
        Py_DECREF(found);
        if (!is_slot) {
            PyErr_Format(PyExc_TypeError, "%s must be a slot of %s", slot_names[i], type->tp_name);
            return NULL;
        }
    }
    memcpy(slot_at, at, sizeof at);
    Py_XSETREF(no_place, Py_NewRef(arguments[1]));
    Py_INCREF(type);
    Py_XSETREF(entry_type, type);
    Py_RETURN_NONE;
}

static int is_list(PyObject *object, const char *what, Py_ssize_t count)
{
    if (!PyList_Check(object))
        PyErr_Format(PyExc_TypeError, "%s must be a list, got %s", what, Py_TYPE(object)->tp_name);
    else if (count >= 0 && PyList_GET_SIZE(object) != count)
        PyErr_Format(PyExc_ValueError, "%s must be %zd, got %zd", what, count, PyList_GET_SIZE(object));
    else
        return 1;
    return 0;
}

/* Whether something is an entry, with all its slots filled. */
static int is_entry(PyObject *object)
{
    if (entry_type == NULL || !Py_IS_TYPE(object, entry_type)) {
        PyErr_Format(PyExc_TypeError, "expected an entry, got %s", Py_TYPE(object)->tp_name);
        return 0;
    }
    for (int i = 0; i < SLOTS_OF_ENTRY; i++)
        if (!is_filled(object, i)) {
            PyErr_Format(PyExc_AttributeError, "%s of an entry is not set", slot_names[i]);
            return 0;
        }
    return 1;
}

static int are_entries(PyObject *list, Py_ssize_t count, int or_none)
{
    if (!is_list(list, "entries", count))
        return 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
        PyObject *entry = PyList_GET_ITEM(list, i);
        if (!(or_none && entry == Py_None) && !is_entry(entry))
            return 0;
    }
    return 1;
}

/* new_entries(keys, scope, generation, lengths, sides, priorities, hashes, corrections, written) -> entries */
static PyObject *new_entries(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    static const int of_each[] = {KEY, -1, -1, LENGTH, SIDE, PRIORITY, KEY_HASH, CORRECTION, -1};
    if (!enough(count, 9))
        return NULL;
    if (entry_type == NULL) {
        PyErr_SetString(PyExc_TypeError, "bind a class first");
        return NULL;
    }
    Py_ssize_t entries = PyList_Check(arguments[0]) ? PyList_GET_SIZE(arguments[0]) : -1;
    for (int i = 0; i < 9; i++)
        if (of_each[i] >= 0 && !is_list(arguments[i], slot_names[of_each[i]], entries))
            return NULL;
    PyObject *zero = PyLong_FromLong(0), *no_row = PyLong_FromLong(-1), *made = PyList_New(entries);
    for (Py_ssize_t i = 0; made != NULL && i < entries; i++) {
        PyObject *entry = entry_type->tp_alloc(entry_type, 0);
        if (entry == NULL) {
            Py_CLEAR(made);
            break;
        }
        for (int column = 0; column < 9; column++)
            if (of_each[column] >= 0)
                *slot(entry, of_each[column]) = Py_NewRef(PyList_GET_ITEM(arguments[column], i));
        *slot(entry, INDEX_KEY) = Py_NewRef(*slot(entry, KEY));
        *slot(entry, SCOPE) = Py_NewRef(arguments[1]);
        *slot(entry, GENERATION) = Py_NewRef(arguments[2]);
        *slot(entry, WRITTEN) = Py_NewRef(arguments[8]);
        *slot(entry, TICKS) = Py_NewRef(arguments[8]);
        *slot(entry, ROW) = Py_NewRef(no_row);
        *slot(entry, TAIL) = Py_NewRef(zero);
        *slot(entry, REFS) = Py_NewRef(zero);
        *slot(entry, PINS) = Py_NewRef(zero);
        *slot(entry, PLACE) = Py_NewRef(no_place);
        PyList_SET_ITEM(made, i, entry);
    }
    Py_DECREF(zero);
    Py_DECREF(no_row);
    return made;
}

/* describe(entries, scope) -> (rows in the tables, lengths, corrections, those of other scopes); 0, 0 and None for None. */
static PyObject *describe(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 2) || !are_entries(arguments[0], -1, 1))
        return NULL;
    Py_ssize_t entries = PyList_GET_SIZE(arguments[0]);
    PyObject *zero = PyLong_FromLong(0);
    PyObject *rows = PyList_New(entries), *lengths = PyList_New(entries), *corrections = PyList_New(entries);
    PyObject *others = PyList_New(0);
    int made = rows && lengths && corrections && others;
    PyObject *described = made ? PyTuple_Pack(4, rows, lengths, corrections, others) : NULL;
    for (Py_ssize_t i = 0; described != NULL && i < entries; i++) {
        PyObject *entry = PyList_GET_ITEM(arguments[0], i);
        int none = entry == Py_None;
        PyList_SET_ITEM(rows, i, Py_NewRef(none ? zero : *slot(entry, ROW)));
        PyList_SET_ITEM(lengths, i, Py_NewRef(none ? zero : *slot(entry, LENGTH)));
        PyList_SET_ITEM(corrections, i, Py_NewRef(none ? Py_None : *slot(entry, CORRECTION)));
        if (!none && *slot(entry, SCOPE) != arguments[1] && PyList_Append(others, entry) < 0)
            Py_CLEAR(described);
    }
    Py_DECREF(zero);
    Py_XDECREF(rows);
    Py_XDECREF(lengths);
    Py_XDECREF(corrections);
    Py_XDECREF(others);
    return described;
}

enum { FEW = 32 }; /* entries whose references before a change fit on the stack */

/* Put back what `add_references` has changed of the first `done`, the last first. Needs no memory. */
static void undo_references(PyObject *entries, PyObject **before, Py_ssize_t done)
{
    while (done-- > 0)
        put(PyList_GET_ITEM(entries, done), REFS, before[done]);
}

/* `change` more references of each; those that have none then join `dead`. All of it, or nothing and 0 with an exception.
 * `before` gets what they had, for `undo_references`, or to be let go of by `keep_references`.
 */
static int add_references(PyObject *entries, long change, PyObject **before, PyObject *dead)
{
    Py_ssize_t done = 0;
    for (; done < PyList_GET_SIZE(entries); done++) {
        PyObject *entry = PyList_GET_ITEM(entries, done);
        long refs = PyLong_AsLong(*slot(entry, REFS));
        PyObject *changed = refs == -1 && PyErr_Occurred() ? NULL : PyLong_FromLong(refs + change);
        if (changed == NULL || (dead != NULL && refs + change == 0 && PyList_Append(dead, entry) < 0)) {
            Py_XDECREF(changed);
            undo_references(entries, before, done);
            return 0;
        }
        before[done] = *slot(entry, REFS);
        fill(entry, REFS, changed);
    }
    return 1;
}

static void keep_references(PyObject **before, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        Py_DECREF(before[i]);
}

/* Room for what so many entries had before: `few`, or memory that the caller frees; NULL with an exception. */
static PyObject **room_for(Py_ssize_t count, PyObject **few)
{
    PyObject **before = count <= FEW ? few : PyMem_Malloc(count * sizeof(PyObject *));
    if (before == NULL)
        PyErr_NoMemory();
    return before;
}

/* retain(entries, held): one more reference of each, which join the list `held`. All of it, or nothing where it raises. */
static PyObject *retain(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 2) || !are_entries(arguments[0], -1, 0) || !is_list(arguments[1], "held", -1))
        return NULL;
    Py_ssize_t entries = PyList_GET_SIZE(arguments[0]), end = PyList_GET_SIZE(arguments[1]);
    PyObject *few[FEW], **before = room_for(entries, few);
    if (before == NULL)
        return NULL;
    int done = add_references(arguments[0], 1, before, NULL);
    if (done && PyList_SetSlice(arguments[1], end, end, arguments[0]) < 0) {
        undo_references(arguments[0], before, entries);
        done = 0;
    }
    if (done)
        keep_references(before, entries);
    if (before != few)
        PyMem_Free(before);
    return done ? Py_NewRef(Py_None) : NULL;
}

/* Rows and ticks of the dead as two new lists, the second without those of none and the same twice in a row. */
static int rows_and_ticks(PyObject *dead, PyObject *rows, PyObject *ticks)
{
    PyObject *last = NULL;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dead); i++) {
        PyObject *entry = PyList_GET_ITEM(dead, i), *used = *slot(entry, TICKS);
        PyList_SET_ITEM(rows, i, Py_NewRef(*slot(entry, ROW)));
        int some = used == last ? 0 : PyObject_IsTrue(used);
        if (some < 0 || (some && PyList_Append(ticks, used) < 0))
            return 0;
        last = used;
    }
    return 1;
}

/* let_go(entries) -> (those that have no reference any more, once one of each is gone; their rows; the ticks of their
 * uses, where there are any). All of it, or nothing where it raises.
 */
static PyObject *let_go(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 1) || !are_entries(arguments[0], -1, 0))
        return NULL;
    Py_ssize_t entries = PyList_GET_SIZE(arguments[0]);
    PyObject *few[FEW], **before = room_for(entries, few);
    PyObject *dead = before == NULL ? NULL : PyList_New(0), *rows = NULL, *ticks = NULL, *result = NULL;
    if (dead != NULL && add_references(arguments[0], -1, before, dead)) {
        if ((rows = PyList_New(PyList_GET_SIZE(dead))) != NULL && (ticks = PyList_New(0)) != NULL &&
            rows_and_ticks(dead, rows, ticks))
            result = PyTuple_Pack(3, dead, rows, ticks);
        if (result == NULL)
            undo_references(arguments[0], before, entries);
        else
            keep_references(before, entries);
    }
    if (before != few)
        PyMem_Free(before);
    Py_XDECREF(dead);
    Py_XDECREF(rows);
    Py_XDECREF(ticks);
    return result;
}

/* name_rows(entries, rows, tails): what each has got in the tables, and the index's reference. Needs no memory. */
static PyObject *name_rows(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 3) || !are_entries(arguments[0], -1, 0))
        return NULL;
    Py_ssize_t entries = PyList_GET_SIZE(arguments[0]);
    if (!is_list(arguments[1], "rows", entries) || !is_list(arguments[2], "tails", entries))
        return NULL;
    for (Py_ssize_t i = 0; i < entries; i++) {
        PyObject *entry = PyList_GET_ITEM(arguments[0], i);
        put(entry, ROW, Py_NewRef(PyList_GET_ITEM(arguments[1], i)));
        put(entry, TAIL, Py_NewRef(PyList_GET_ITEM(arguments[2], i)));
        put(entry, REFS, PyLong_FromLong(1)); /* there for good, like all small numbers */
    }
    Py_RETURN_NONE;
}

/* displace(entries): each at the place of new ones. */
static PyObject *displace(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 1) || !are_entries(arguments[0], -1, 0))
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(arguments[0]); i++)
        put(PyList_GET_ITEM(arguments[0], i), PLACE, Py_NewRef(no_place));
    Py_RETURN_NONE;
}

/* Whether the entry in a cell has an equal key; below 0 with an exception set. Runs its key's `__eq__`. */
static int has_key(PyObject *entry, PyObject *key)
{
    if (entry_type == NULL || !Py_IS_TYPE(entry, entry_type) || *slot(entry, INDEX_KEY) == NULL) {
        PyErr_Format(PyExc_TypeError, "a cell must have an entry, got %s", Py_TYPE(entry)->tp_name);
        return -1;
    }
    PyObject *known = Py_NewRef(*slot(entry, INDEX_KEY));
    int equal = PyObject_RichCompareBool(known, key, Py_EQ);
    Py_DECREF(known);
    return equal;
}

/* The entry of a key among cells, or None; NULL with an exception set. */
static PyObject *find_one(PyObject *cells, PyObject *key, PyObject *hash)
{
    PyObject *cell = found_in(cells, hash);
    if (cell == NULL || !PyList_Check(cell) || !PyList_GET_SIZE(cell)) {
        Py_XDECREF(cell);
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    }
    PyObject *item = Py_NewRef(PyList_GET_ITEM(cell, 0));
    Py_DECREF(cell);
    int equal = has_key(item, key);
    if (equal > 0)
        return item;
    Py_DECREF(item);
    return equal < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *cells_name, *extra_name;

static int intern_index_names(void)
{
    return intern(&cells_name, "cells") && intern(&extra_name, "extra");
}

/* An attribute of an index, which has to be a dict. */
static PyObject *dict_of(PyObject *index, PyObject *name)
{
    PyObject *dict = PyObject_GetAttr(index, name);
    if (dict != NULL && !PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "%U of an index must be a dict, got %s", name, Py_TYPE(dict)->tp_name);
        Py_CLEAR(dict);
    }
    return dict;
}

/* find(indexes, keys, hashes) -> the entry of each key in its index, or None; None where an index has extra places. Runs
 * `__eq__` of stored keys.
 */
static PyObject *find(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 3) || !is_list(arguments[0], "indexes", -1) ||
        !is_list(arguments[1], "keys", PyList_GET_SIZE(arguments[0])) ||
        !is_list(arguments[2], "hashes", PyList_GET_SIZE(arguments[0])))
        return NULL;
    PyObject *found = PyList_New(0), *index = NULL, *cells = NULL;
    for (Py_ssize_t i = 0; found != NULL && i < PyList_GET_SIZE(arguments[0]); i++) {
        if (i >= PyList_GET_SIZE(arguments[1]) || i >= PyList_GET_SIZE(arguments[2])) {
            PyErr_SetString(PyExc_ValueError, "the lists must not change");
            Py_CLEAR(found);
            break;
        }
        if (index != PyList_GET_ITEM(arguments[0], i)) { /* or it is the one of the key before */
            Py_XSETREF(index, Py_NewRef(PyList_GET_ITEM(arguments[0], i)));
            PyObject *extra = dict_of(index, extra_name);
            Py_XSETREF(cells, extra == NULL ? NULL : dict_of(index, cells_name));
            if (cells != NULL && PyDict_GET_SIZE(extra)) {
                Py_DECREF(found);
                found = Py_NewRef(Py_None);
            }
            Py_XDECREF(extra);
            if (cells == NULL || found == Py_None) {
                if (cells == NULL)
                    Py_CLEAR(found);
                break;
            }
        }
        PyObject *key = Py_NewRef(PyList_GET_ITEM(arguments[1], i)), *hash = Py_NewRef(PyList_GET_ITEM(arguments[2], i));
        PyObject *item = find_one(cells, key, hash);
        if (item == NULL || PyList_Append(found, item) < 0)
            Py_CLEAR(found);
        Py_XDECREF(item);
        Py_DECREF(key);
        Py_DECREF(hash);
    }
    Py_XDECREF(index);
    Py_XDECREF(cells);
    return found;
}

/* items_of(cells) -> what is in the cells of a dict, in its order. */
static PyObject *items_of(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 1))
        return NULL;
    if (!PyDict_Check(arguments[0])) {
        PyErr_Format(PyExc_TypeError, "cells must be a dict, got %s", Py_TYPE(arguments[0])->tp_name);
        return NULL;
    }
    PyObject *items = PyList_New(0), *cell;
    Py_BEGIN_CRITICAL_SECTION(arguments[0]);
    for (Py_ssize_t at = 0; items != NULL && PyDict_Next(arguments[0], &at, NULL, &cell);)
        if (!is_list(cell, "a cell", -1) ||
            (PyList_GET_SIZE(cell) && PyList_Append(items, PyList_GET_ITEM(cell, 0)) < 0))
            Py_CLEAR(items);
    Py_END_CRITICAL_SECTION();
    return items;
}

/* Take new cells out of their dicts, by their hashes, the newest first; keep the exception that is set. Needs no memory. */
static void take_away(PyObject *added, PyObject *hashes)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    for (Py_ssize_t i = PyList_GET_SIZE(hashes) - 1; i >= 0; i--)
        if (PyDict_DelItem(PyList_GET_ITEM(added, i), PyList_GET_ITEM(hashes, i)) < 0)
            PyErr_Clear();
    PyErr_Restore(type, value, trace);
}

/* An empty list with room for an item, which `occupy` then needs no memory for. */
static PyObject *new_cell(void)
{
    PyObject *cell = PyList_New(1);
    if (cell != NULL)
        Py_SET_SIZE(cell, 0);
    return cell;
}

/* The place of one key; 0 with an exception set, or without one where another key has its place. */
static int add_place(PyObject *cells, PyObject *key, PyObject *hash, PyObject *lists[5])
{
    PyObject *new = new_cell();
    PyObject *cell = new == NULL ? NULL : PyDict_SetDefault(cells, hash, new);
    int added = cell != NULL && cell == new;
    if (added && (PyList_Append(lists[3], cells) < 0 || PyList_Append(lists[4], hash) < 0)) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        if (PyDict_DelItem(cells, hash) < 0)
            PyErr_Clear();
        PyErr_Restore(type, value, trace);
        cell = NULL;
    }
    if (cell != NULL && !PyList_Check(cell)) {
        PyErr_Format(PyExc_TypeError, "a cell must be a list, got %s", Py_TYPE(cell)->tp_name);
        cell = NULL;
    }
    if (cell != NULL && !added) {
        PyObject *known = PyList_GET_SIZE(cell) ? Py_NewRef(PyList_GET_ITEM(cell, 0)) : NULL;
        if (known == NULL || has_key(known, key) != 1)
            cell = NULL;
        Py_XDECREF(known);
    }
    int done = 0;
    if (cell != NULL) {
        PyObject *item = PyList_GET_SIZE(cell) ? PyList_GET_ITEM(cell, 0) : Py_None;
        done = PyList_Append(lists[0], cell) == 0 && PyList_Append(lists[1], item) == 0 &&
               (item == Py_None || PyList_Append(lists[2], item) == 0);
    }
    Py_XDECREF(new);
    return done;
}

/* places(dicts, keys, hashes) -> (each key's cell in its dict, what each holds or None, those held, dicts of new cells)
 *
 * Adds empty cells, or none where a key raises or, and then it returns None, where two keys have one hash. Runs `__eq__`
 * of stored keys.
 */
static PyObject *places(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 3) || !is_list(arguments[0], "dicts", -1) ||
        !is_list(arguments[1], "keys", PyList_GET_SIZE(arguments[0])) ||
        !is_list(arguments[2], "hashes", PyList_GET_SIZE(arguments[0])))
        return NULL;
    PyObject *lists[5] = {PyList_New(0), PyList_New(0), PyList_New(0), PyList_New(0), PyList_New(0)};
    PyObject *result = NULL;
    int done = lists[0] && lists[1] && lists[2] && lists[3] && lists[4]; /* the last: hashes of the dicts in the one before */
    Py_ssize_t keys = PyList_GET_SIZE(arguments[0]);
    for (Py_ssize_t i = 0; done && i < keys; i++) {
        if (PyList_GET_SIZE(arguments[0]) != keys || PyList_GET_SIZE(arguments[1]) != keys ||
            PyList_GET_SIZE(arguments[2]) != keys) {
            PyErr_SetString(PyExc_ValueError, "the lists must not change");
            done = 0;
            break;
        }
        PyObject *cells = Py_NewRef(PyList_GET_ITEM(arguments[0], i)), *key = Py_NewRef(PyList_GET_ITEM(arguments[1], i));
        PyObject *hash = Py_NewRef(PyList_GET_ITEM(arguments[2], i));
        if (!PyDict_Check(cells))
            PyErr_Format(PyExc_TypeError, "dicts must be of dicts, got %s", Py_TYPE(cells)->tp_name);
        else if (!PyLong_Check(hash))
            PyErr_Format(PyExc_TypeError, "hashes must be ints, got %s", Py_TYPE(hash)->tp_name);
        done = PyDict_Check(cells) && PyLong_Check(hash) && add_place(cells, key, hash, lists);
        Py_DECREF(cells);
        Py_DECREF(key);
        Py_DECREF(hash);
    }
    if (done)
        result = PyTuple_Pack(4, lists[0], lists[1], lists[2], lists[3]);
    if (result == NULL && lists[3] != NULL && lists[4] != NULL)
        take_away(lists[3], lists[4]);
    if (result == NULL && !PyErr_Occurred())
        result = Py_NewRef(Py_None);
    for (int i = 0; i < 5; i++)
        Py_XDECREF(lists[i]);
    return result;
}

/* Whether an empty list has, or now gets, room for one item. (Those that `places` makes have; those of Python's have none.)
 * It gets that of another list: a thread without the shard's lock, which may look at the cell, must not see an item. */
static int has_room(PyObject *cell)
{
    PyListObject *list = (PyListObject *)cell;
    if (PyList_GET_SIZE(cell) || list->ob_item != NULL)
        return 1;
    PyListObject *other = (PyListObject *)new_cell();
    if (other == NULL)
        return 0;
    list->allocated = other->allocated;
#ifdef Py_GIL_DISABLED
    _Py_atomic_store_ptr_release(&list->ob_item, other->ob_item);
#else
    list->ob_item = other->ob_item;
#endif
    other->ob_item = NULL;
    other->allocated = 0;
    Py_DECREF(other);
    return 1;
}

/* occupy(cells, entries, held, place): each entry into its cell, at `place`; where the cell held one, in its stead and
 * with its key. All of it, or nothing where it raises.
 */
static PyObject *occupy(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 4) || !is_list(arguments[0], "cells", -1))
        return NULL;
    Py_ssize_t entries = PyList_GET_SIZE(arguments[0]);
    if (!are_entries(arguments[1], entries, 0) || !are_entries(arguments[2], entries, 1))
        return NULL;
    for (Py_ssize_t i = 0; i < entries; i++)
        if (!is_list(PyList_GET_ITEM(arguments[0], i), "a cell", PyList_GET_ITEM(arguments[2], i) != Py_None) ||
            !has_room(PyList_GET_ITEM(arguments[0], i)))
            return NULL;
    /* Nothing fails from here on. */
    for (Py_ssize_t i = 0; i < entries; i++) {
        PyObject *cell = PyList_GET_ITEM(arguments[0], i), *entry = PyList_GET_ITEM(arguments[1], i);
        PyObject *held = PyList_GET_ITEM(arguments[2], i);
        put(entry, PLACE, Py_NewRef(arguments[3]));
        if (held != Py_None)
            put(entry, INDEX_KEY, Py_NewRef(*slot(held, INDEX_KEY)));
        if (held == Py_None ? PyList_Append(cell, entry) : PyList_SetItem(cell, 0, Py_NewRef(entry)))
            return NULL;
    }
    Py_RETURN_NONE;
}

#endif
