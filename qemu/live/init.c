/*
 * The first process of a guest that is looked at while it runs.
 *
 * It has three serial lines. ttyS0 is the kernel's console. On ttyS2 it only writes: what it has planted, as
 * key=value lines between KSTUB-FACTS and KSTUB-LIVE-READY, and then its heartbeat, "beat NUMBER MILLISECONDS"
 * every 100 ms. On ttyS1 it takes commands, a line each; it answers with any number of lines, and last a line
 * "ok" or "error ERRNO WHAT":
 *
 *   ping [WORD...]                     answers the words
 *   insmod NAME [PARAMETER=VALUE...]   rmmod NAME
 *   plant PROGRAM [ARGUMENT...]        starts /bin/PROGRAM; answers what it printed up to planted=1
 *   quiet                              kills all that plant has started
 *   cat PATH                           a file, of which no line is "ok"
 *   symbols NAME...                    their lines of /proc/kallsyms
 *   tasks                              pid, parent, state and name of every process and kernel thread
 *   say TEXT                           a line in the kernel's log
 *   reboot, panic
 */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>

#include "../programs/planted.h"

#define BEAT_MS 100
#define LONGEST_LINE 4096
#define MOST_WORDS 16
#define MOST_PLANTED 64
#define SLEEPERS 3

static FILE *answers;
static pid_t planted_groups[MOST_PLANTED];
static int planted_count;

static FILE *open_serial(const char *path, const char *mode)
{
	struct termios settings;
	int file = open(path, O_RDWR | O_NOCTTY);
	FILE *stream;

	CHECK(file >= 0);
	CHECK(tcgetattr(file, &settings) == 0);
	cfmakeraw(&settings);
	cfsetspeed(&settings, B115200);
	CHECK(tcsetattr(file, TCSANOW, &settings) == 0);
	stream = fdopen(file, mode);
	CHECK(stream);
	return stream;
}

static void mount_filesystems(void)
{
	static const char *const wanted[][2] = {
		{ "proc", "/proc" }, { "sysfs", "/sys" }, { "devtmpfs", "/dev" }, { "tmpfs", "/run" },
	};

	for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
		mkdir(wanted[i][1], 0755);
		mount(wanted[i][0], wanted[i][1], wanted[i][0], 0, NULL);
	}
}

static int insert_module(const char *name, const char *parameters)
{
	char path[256];
	int file;
	long result;

	snprintf(path, sizeof(path), "/modules/%s.ko", name);
	file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return -1;
	result = syscall(SYS_finit_module, file, parameters, 0);
	close(file);
	return result;
}

/* Copies a file, of which each line gets `prefix`. */
static int copy_file(const char *path, FILE *to, const char *prefix)
{
	char line[LONGEST_LINE];
	FILE *from = fopen(path, "re");

	if (!from)
		return -1;
	while (fgets(line, sizeof(line), from)) {
		line[strcspn(line, "\n")] = 0;
		fprintf(to, "%s%s\n", prefix, line);
	}
	fclose(from);
	return 0;
}

/* The lines of /proc/kallsyms with these names; stops at the last that is wanted (all of them takes a second). */
static void find_symbols(FILE *to, const char *prefix, char **names, int count)
{
	char line[LONGEST_LINE], name[512], type;
	unsigned long long address;
	int found = 0;
	FILE *from = fopen("/proc/kallsyms", "re");

	CHECK(from);
	while (found < count && fgets(line, sizeof(line), from)) {
		if (sscanf(line, "%llx %c %511s", &address, &type, name) != 3)
			continue;
		for (int i = 0; i < count; i++) {
			if (strcmp(names[i], name) == 0) {
				fprintf(to, "%s%s=0x%llx\n", prefix, name, address);
				found++;
			}
		}
	}
	fclose(from);
}

static void list_tasks(FILE *to)
{
	DIR *directory = opendir("/proc");
	struct dirent *entry;

	CHECK(directory);
	while ((entry = readdir(directory))) {
		char path[300], text[LONGEST_LINE], *name, *end;
		char state;
		int parent;
		FILE *file;

		if (entry->d_name[0] < '1' || entry->d_name[0] > '9')
			continue;
		snprintf(path, sizeof(path), "/proc/%s/stat", entry->d_name);
		file = fopen(path, "re");
		if (!file)
			continue;
		text[fread(text, 1, sizeof(text) - 1, file)] = 0;
		fclose(file);
		name = strchr(text, '(');
		end = strrchr(text, ')');
		if (!name || !end || sscanf(end + 1, " %c %d", &state, &parent) != 2)
			continue;
		*end = 0;
		fprintf(to, "%s %d %c %s\n", entry->d_name, parent, state, name + 1);
	}
	closedir(directory);
}

/* A process of this name that sleeps for ever. */
static pid_t sleeper(const char *name)
{
	pid_t child = fork();

	CHECK(child >= 0);
	if (child == 0) {
		name_thread(name);
		for (;;)
			pause();
	}
	return child;
}

static void report_facts(FILE *report)
{
	static char *symbols[] = { "_text", "_stext" };
	struct utsname system;
	char name[16];

	uname(&system);
	fprintf(report, "KSTUB-FACTS\nrelease=%s\nversion=%s\ncpus=%ld\n", system.release, system.version,
		sysconf(_SC_NPROCESSORS_ONLN));
	for (int i = 1; i <= SLEEPERS; i++) {
		snprintf(name, sizeof(name), "kstub-nap-%d", i);
		fprintf(report, "pid.%s=%d\n", name, sleeper(name));
	}
	copy_file("/proc/kstub_live", report, "");
	find_symbols(report, "symbol.", symbols, 2);
	copy_file("/proc/iomem", report, "iomem=");
}

static void beat(FILE *report)
{
	struct timespec now;
	unsigned long number = 0;

	name_thread("kstub-beat");
	fprintf(report, "pid.kstub-beat=%d\nKSTUB-LIVE-READY\n", getpid());
	for (;; number++) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		fprintf(report, "beat %lu %lu\n", number, now.tv_sec * 1000ul + now.tv_nsec / 1000000);
		fflush(report);
		usleep(BEAT_MS * 1000);
	}
}

/* Starts a program in a process group of its own and hands on what it prints until all is planted. */
static int plant(char **words)
{
	char path[256], line[LONGEST_LINE];
	int ends[2], done = 0;
	pid_t child;
	FILE *from;

	if (planted_count == MOST_PLANTED) {
		errno = ENOSPC;
		return -1;
	}
	snprintf(path, sizeof(path), "/bin/%s", words[1]);
	if (access(path, X_OK) != 0)
		return -1;
	CHECK(pipe2(ends, O_CLOEXEC) == 0);
	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		setpgid(0, 0);
		dup2(ends[1], 1);
		execv(path, words + 1);
		_exit(127);
	}
	setpgid(child, child);
	close(ends[1]);
	planted_groups[planted_count++] = child;
	from = fdopen(ends[0], "r");
	CHECK(from);
	while (!done && fgets(line, sizeof(line), from)) {
		fputs(line, answers);
		done = strncmp(line, "planted=1", 9) == 0;
	}
	/* Kept open when it is done: a program that prints more must not die of it. */
	if (!done) {
		fclose(from);
		errno = ECHILD;
		return -1;
	}
	return 0;
}

static void quiet(void)
{
	while (planted_count > 0) {
		pid_t group = planted_groups[--planted_count];

		kill(-group, SIGKILL);
		waitpid(group, NULL, 0);
	}
	/* What they had started is ours now. */
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
}

static int write_file(const char *path, const char *text)
{
	int file = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t written;

	if (file < 0)
		return -1;
	written = write(file, text, strlen(text));
	close(file);
	return written < 0 ? -1 : 0;
}

/* Joins words that were taken apart at blanks. */
static const char *joined(char **words)
{
	static char text[LONGEST_LINE];

	text[0] = 0;
	for (; *words; words++) {
		strcat(text, *words);
		if (words[1])
			strcat(text, " ");
	}
	return text;
}

static int obey(char **words, int count)
{
	const char *command = words[0];

	if (strcmp(command, "ping") == 0)
		return fprintf(answers, "%s\n", joined(words + 1)), 0;
	if (strcmp(command, "insmod") == 0 && count > 1)
		return insert_module(words[1], joined(words + 2));
	if (strcmp(command, "rmmod") == 0 && count > 1)
		return syscall(SYS_delete_module, words[1], O_NONBLOCK);
	if (strcmp(command, "plant") == 0 && count > 1)
		return plant(words);
	if (strcmp(command, "quiet") == 0)
		return quiet(), 0;
	if (strcmp(command, "cat") == 0 && count > 1)
		return copy_file(words[1], answers, "");
	if (strcmp(command, "symbols") == 0)
		return find_symbols(answers, "", words + 1, count - 1), 0;
	if (strcmp(command, "tasks") == 0)
		return list_tasks(answers), 0;
	if (strcmp(command, "say") == 0)
		return write_file("/dev/kmsg", joined(words + 1));
	if (strcmp(command, "reboot") == 0)
		return reboot(RB_AUTOBOOT);
	if (strcmp(command, "panic") == 0)
		return write_file("/proc/sysrq-trigger", "c");
	errno = ENOSYS;
	return -1;
}

int main(void)
{
	char line[LONGEST_LINE];
	FILE *commands, *report;

	mount_filesystems();
	report = open_serial("/dev/ttyS2", "w");
	commands = open_serial("/dev/ttyS1", "r");
	answers = open_serial("/dev/ttyS1", "w");
	sethostname("kstub-live", 10);
	write_file("/dev/kmsg", "<5>kstub: a planted line in the kernel log");
	write_file("/proc/sys/kernel/sysrq", "1");
	write_file("/proc/sys/kernel/kptr_restrict", "0");
	if (insert_module("kstub_live", "") != 0)
		fprintf(report, "KSTUB-GUEST-FAILED kstub_live: %s\n", strerror(errno));
	report_facts(report);
	fflush(report);
	if (fork() == 0)
		beat(report);

	while (fgets(line, sizeof(line), commands)) {
		char *words[MOST_WORDS + 1] = { NULL }, *word, *rest = line;
		int count = 0;

		while (count < MOST_WORDS && (word = strsep(&rest, " \r\n")))
			if (*word)
				words[count++] = word;
		if (count == 0)
			continue;
		if (obey(words, count) == 0)
			fprintf(answers, "ok\n");
		else
			fprintf(answers, "error %d %s\n", errno, strerror(errno));
		fflush(answers);
	}
	for (;;)
		pause();
}
